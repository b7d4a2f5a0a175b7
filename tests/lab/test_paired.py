"""Differences on the same problems against oracles that share nothing with them."""

import numpy as np
import pytest
from scipy import optimize, stats

from fp4rl.lab.statistics.paired import paired, tango
from fp4rl.lab.statistics.proportions import wilson
from fp4rl.spec.errors import InvalidValueError


def score_by_search(gained, lost, total, difference):
    """Tango's score statistic, its likeliest shares found by a numeric search instead of a formula."""

    def unlikely(second_alone):
        first_alone = second_alone + difference
        rest = 1 - first_alone - second_alone
        parts = ((gained, first_alone), (lost, second_alone), (total - gained - lost, rest))
        if any(count and share <= 0 for count, share in parts) or min(first_alone, rest) < -1e-12:
            return np.inf
        return -sum(count * np.log(share) for count, share in parts if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    found = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13})
    candidates = [found.x, low + 1e-13, high - 1e-13]
    q = min(candidates, key=unlikely)
    return (gained - lost - total * difference) / np.sqrt(total * (2 * q + difference - difference**2))


@pytest.mark.parametrize(
    "gained, lost, total",
    [(12, 5, 100), (1, 0, 44), (9, 5, 32), (40, 3, 50), (2, 30, 500), (7, 7, 20), (1, 8, 9)],
)
def test_both_ends_of_the_interval_are_where_the_score_test_rejects(gained, lost, total):
    found = tango(gained, lost, total)
    z = stats.norm.ppf(0.975)
    assert found.value == pytest.approx((gained - lost) / total)
    assert found.low < found.value < found.high
    if found.low > -1 + 1e-6:
        assert score_by_search(gained, lost, total, found.low) == pytest.approx(z, abs=2e-4)
    if found.high < 1 - 1e-6:
        assert score_by_search(gained, lost, total, found.high) == pytest.approx(-z, abs=2e-4)
    assert found.p == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def test_it_mirrors_and_it_does_not_vanish_without_flips():
    there, back = tango(9, 4, 60), tango(4, 9, 60)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    still, z = tango(0, 0, 100), stats.norm.ppf(0.975)
    assert (still.value, still.p) == (0.0, 1.0)
    assert (still.low, still.high) == pytest.approx((-(z**2) / (100 + z**2), z**2 / (100 + z**2)))
    assert tango(5, 0, 5).high == 1.0
    for wrong in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(InvalidValueError):
            tango(*wrong)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    """20,000 draws of 200 problems."""
    generator = np.random.default_rng(1)
    drawn = generator.multinomial(200, [0.1, 0.06, 0.84], size=20_000)
    cases, counts = np.unique(drawn, axis=0, return_counts=True)
    held = [t.low <= 0.04 <= t.high for t in (tango(int(g), int(s), 200) for g, s, _ in cases)]
    assert float(np.dot(held, counts) / counts.sum()) == pytest.approx(0.95, abs=0.01)


def test_shares_of_several_answers_are_compared_by_t_over_problems():
    generator = np.random.default_rng(2)
    first, second = generator.integers(0, 5, (2, 80)) / 4
    found, oracle = paired(first.tolist(), second.tolist()), stats.ttest_rel(first, second)
    ends = oracle.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((ends.low, ends.high, oracle.pvalue))
    ones = [1.0, 0.0, 1.0, 1.0]
    assert paired(ones, [0.0, 0.0, 1.0, 1.0]) == tango(1, 0, 4)
    assert paired([0.5] * 9, [0.5] * 9).high == pytest.approx(tango(0, 0, 9).high)


def test_an_interval_of_summed_shares_is_that_of_wilson():
    ends = stats.binomtest(13, 40).proportion_ci(method="wilson")
    assert wilson(13.0, 40) == pytest.approx((ends.low, ends.high))
    low, high = wilson(12.5, 40)
    assert wilson(12, 40)[0] < low < wilson(13, 40)[0] < wilson(12, 40)[1] < high < wilson(13, 40)[1]
