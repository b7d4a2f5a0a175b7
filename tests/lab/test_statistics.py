"""The tests over seeds and over problems, against SciPy, published examples and closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fp4rl.lab.statistics.crossed import multi_bootstrap, two_way, varying
from fp4rl.lab.statistics.power import power, seeds_needed
from fp4rl.lab.statistics.proportions import mcnemar, newcombe, wilson
from fp4rl.lab.statistics.seeds import holm, holm_grouped, not_worse, pooled, welch
from fp4rl.spec.errors import InvalidValueError

ARMS = st.lists(st.floats(0, 100), min_size=2, max_size=8).filter(lambda arm: max(arm) - min(arm) > 1e-3)


@given(ARMS, ARMS)
def test_welch_agrees_with_scipy(treatment: list[float], control: list[float]):
    ours = welch(treatment, control)
    theirs = stats.ttest_ind(treatment, control, equal_var=False)
    interval = theirs.confidence_interval()
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)
    assert ours.freedom == pytest.approx(theirs.df, rel=1e-6)


def test_welch_refuses_a_single_seed():
    with pytest.raises(InvalidValueError, match="two seeds an arm; got 1 and 3"):
        welch([70.0], [71.0, 72.0, 73.0])


def test_welch_refuses_copies_of_one_run():
    with pytest.raises(InvalidValueError, match="no seed differs"):
        welch([70.0, 70.0], [71.0, 71.0])


def test_swapping_the_arms_flips_the_sign_and_nothing_else():
    one, other = welch([1.0, 2.0, 4.0], [3.0, 5.0]), welch([3.0, 5.0], [1.0, 2.0, 4.0])
    assert (one.low, one.high, one.p) == pytest.approx((-other.high, -other.low, other.p))


@given(ARMS, ARMS, st.floats(0.1, 20))
def test_the_lower_bound_clears_the_margin_exactly_when_p_is_at_most_5_percent(treatment, control, margin):
    result = not_worse(treatment, control, margin)
    assert result.clears == (result.p < 0.05) or math.isclose(result.p, 0.05, rel_tol=1e-6)


def test_non_inferiority_is_the_shifted_one_sided_welch_test():
    treatment, control = [70.0, 71.5, 72.0], [71.0, 72.5, 70.5, 73.0]
    shifted = stats.ttest_ind(np.add(treatment, 1.0), control, equal_var=False, alternative="greater")
    assert not_worse(treatment, control, 1.0).p == pytest.approx(shifted.pvalue)


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(InvalidValueError, match="positive number"):
        not_worse([1.0, 2.0], [1.0, 2.0], 0.0)


def test_wilson_agrees_with_scipy():
    theirs = stats.binomtest(890, 1319).proportion_ci(method="wilson")
    assert wilson(890, 1319) == pytest.approx((theirs.low, theirs.high))


def test_newcombe_reproduces_the_published_example():
    # Newcombe (1998), table II, case (a): 56/70 against 48/80, method 10.
    result = newcombe((56, 70), (48, 80))
    assert (result.low, result.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_the_published_lora_comparison_shows_nothing():
    result = newcombe((890, 1319), (869, 1319))
    assert round(result.p, 2) == 0.39
    assert (round(100 * result.low, 1), round(100 * result.high, 1)) == (-2.0, 5.2)


def test_mcnemar_is_the_exact_binomial_test_of_the_flips():
    assert mcnemar(30, 15).p == pytest.approx(stats.binomtest(15, 45).pvalue)
    assert mcnemar(0, 0).p == 1.0
    assert mcnemar(5, 5).p == 1.0


def test_holm_reproduces_the_textbook_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]):
    for raw, corrected in zip(p_values, holm(p_values), strict=True):
        assert raw <= corrected <= min(1.0, raw * len(p_values)) + 1e-15


def test_two_questions_of_one_comparison_count_once():
    assert holm_grouped({("a", "difference"): 0.04, ("a", "margin"): 0.03}) == {
        ("a", "difference"): 0.04,
        ("a", "margin"): 0.03,
    }
    pair = holm_grouped({("a", "difference"): 0.5, ("a", "margin"): 0.03, ("b", "difference"): 0.2})
    assert pair["a", "margin"] == pytest.approx(0.06)


def test_two_way_is_the_welch_test_where_problems_do_not_interact():
    rng = np.random.default_rng(0)
    effect, difficulty = rng.normal(size=(4, 1)), rng.normal(size=(1, 50))
    treatment, control = effect[:2] + difficulty, effect[2:] + difficulty
    ours, seeds = two_way(treatment, control), welch(treatment.mean(1).tolist(), control.mean(1).tolist())
    assert ours.standard_error == pytest.approx(seeds.standard_error)
    assert ours.p == pytest.approx(seeds.p)


def test_two_way_sees_problems_that_react_differently():
    rng = np.random.default_rng(1)
    seeds, reaction = rng.normal(scale=0.01, size=(8, 1)), rng.normal(size=(1, 60))
    treatment, control = seeds[:4] + reaction, seeds[4:] + np.zeros((1, 60))
    assert two_way(treatment, control).standard_error == pytest.approx(reaction.std(ddof=1) / math.sqrt(60), rel=0.02)


def test_two_way_adds_what_seeds_and_problems_contribute():
    rng = np.random.default_rng(4)
    arms = [rng.normal(size=(100, 1)) + rng.normal(size=(1, 100)) for _ in range(2)]
    assert two_way(*arms).standard_error == pytest.approx(math.sqrt(2 / 100 + 2 / 100), rel=0.1)


def test_two_way_does_not_count_the_chance_of_single_answers_twice():
    rng = np.random.default_rng(5)
    arms = [rng.normal(size=(6, 2000)) for _ in range(2)]  # neither seeds nor problems matter
    found = np.mean([two_way(*(rng.permuted(arm) for arm in arms)).standard_error ** 2 for _ in range(40)])
    assert found == pytest.approx(2 / 12000, rel=0.25)


def test_two_way_refuses_other_problems():
    with pytest.raises(InvalidValueError, match="must be the same"):
        two_way(np.ones((2, 3)), np.ones((2, 4)))


@pytest.mark.parametrize("scores", [(0.0, 0.0), (100.0, 0.0)])
def test_two_way_says_where_nothing_varies(scores):
    treatment, control = (np.full((2, 5), own) for own in scores)
    assert not varying(treatment, control)
    with pytest.raises(InvalidValueError, match="neither seeds nor problems vary"):
        two_way(treatment, control)
    for changed in ((0, slice(None)), (slice(None), 0)):  # a seed, then a problem
        other = treatment.copy()
        other[changed] += 1.0
        assert varying(other, control)


def test_the_multi_bootstrap_is_reproducible_and_holds_a_clear_difference():
    rng = np.random.default_rng(2)
    control = (rng.random((5, 300)) < 0.4).astype(float)
    treatment = (rng.random((5, 300)) < 0.7).astype(float)
    first = multi_bootstrap(treatment, control, generator=np.random.default_rng(0))
    assert first == multi_bootstrap(treatment, control, generator=np.random.default_rng(0))
    assert first.low > 0.2
    assert first.high < 0.4


def test_the_multi_bootstrap_spread_is_that_of_seeds_and_problems_together():
    rng = np.random.default_rng(3)
    treatment = rng.normal(size=(40, 1)) + rng.normal(scale=0.1, size=(40, 30))
    control = rng.normal(size=(40, 1)) + rng.normal(scale=0.1, size=(40, 30))
    found = multi_bootstrap(treatment, control, generator=np.random.default_rng(0), draws=4000)
    seeds = welch(treatment.mean(1).tolist(), control.mean(1).tolist())
    assert found.high - found.low == pytest.approx(2 * 1.96 * seeds.standard_error, rel=0.06)


def test_power_is_a_chance_that_grows_with_the_seeds_however_large_the_difference():
    """The kind: NaN shown as a figure, far from where a series converges (`seen in nan of 100 tries`)."""
    for difference in (0.1, 2.0, 8.0, 60.0, 1e6):
        for margin in (None, 1.0):
            found = [power(seeds, difference, 1.0, margin=margin) for seeds in range(2, 60)]
            assert all(0 <= one <= 1 for one in found)
            assert all(later >= earlier - 1e-9 for earlier, later in pairwise(found))
    assert power(5, -60.0, 1.0, margin=1.0) == pytest.approx(0.0, abs=1e-9)  # far worse never passes as no worse


def test_power_agrees_with_the_noncentral_t_of_scipy():
    freedom, shift = 12, 2.5 / (1.57 * math.sqrt(2 / 7))
    quantile = stats.t.ppf(0.975, freedom)
    expected = stats.nct.sf(quantile, freedom, shift) + stats.nct.cdf(-quantile, freedom, shift)
    assert power(7, 2.5, 1.57) == pytest.approx(expected, rel=1e-6)


def test_about_seven_seeds_see_two_and_a_half_points():
    assert 0.75 < power(7, 2.5, 1.57) < 0.8
    assert seeds_needed(2.5, 1.57, chance=0.75) == 7
    assert seeds_needed(2.5, 1.57, chance=0.8) == 8


def test_more_comparisons_need_more_seeds():
    assert seeds_needed(2.5, 1.57, alpha=0.05 / 6) > seeds_needed(2.5, 1.57)


def test_a_difference_of_nothing_is_never_seen():
    with pytest.raises(InvalidValueError, match="never seen"):
        seeds_needed(0.0, 1.57)


def test_spread_pools_the_repeats_and_ignores_single_runs():
    spread = pooled([[70.0, 72.0], [50.0, 50.0, 53.0], [90.0]])
    assert spread is not None
    assert (spread.freedom, spread.groups) == (3, 2)
    assert spread.sd == pytest.approx(math.sqrt((2.0 + 6.0) / 3))
    assert pooled([[70.0], [71.0]]) is None


@pytest.mark.parametrize("seeds", [2, 3, 7, 20])
def test_the_smallest_difference_that_is_seen_is_the_inverse_of_power(seeds):
    from fp4rl.lab.statistics.power import difference_seen, power

    least = difference_seen(seeds, 1.57)
    assert power(seeds, least, 1.57) == pytest.approx(0.8, abs=1e-3)
    assert power(seeds, 0.98 * least, 1.57) < 0.8
    if seeds == 20:  # t tables: d = 0.909 standard deviations for 20 an arm, 80 %, two-sided 5 %
        assert least / 1.57 == pytest.approx(0.909, abs=0.002)
