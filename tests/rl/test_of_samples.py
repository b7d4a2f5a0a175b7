"""pass@k and maj@k against every way to draw k answers, tried one by one."""

import itertools
import random
from collections import Counter
from statistics import fmean

import pytest

from fp4rl.rl.answered import Evaluation, Item
from fp4rl.rl.of_samples import majority_at, pass_at
from fp4rl.spec.evidence import Profile

DRAWN = random.Random(7)
CASES = [[DRAWN.choice(["1", "2", "3", None]) for _ in range(n)] for n in (1, 2, 3, 5, 6, 8) for _ in range(4)]


def drawn_majority(answers, right):
    """The share of right answers among the most frequent of those that can be read."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(answer in right for answer in most) / len(most) if most else 0.0


@pytest.mark.parametrize("answers", CASES, ids=str)
def test_every_k_is_the_mean_over_all_draws(answers):
    n, right = len(answers), {"1", "3"} if len(answers) % 2 else {"1"}
    solved = [answer in right for answer in answers]
    for k in range(1, n + 1):
        draws = list(itertools.combinations(range(n), k))
        passed = fmean(any(solved[i] for i in draw) for draw in draws)
        majority = fmean(drawn_majority([answers[i] for i in draw], right) for draw in draws)
        assert pass_at(sum(solved), n, k) == pytest.approx(passed)
        assert majority_at(Counter(answers), right, k) == pytest.approx(majority)


def item(problem, sample, strict, read):
    return Item(
        strict=strict,
        flexible=strict,
        formatted=True,
        problem_id=problem,
        sample=sample,
        completion="",
        length=1,
        truncated=False,
        read=read,
    )


def test_an_evaluation_of_several_samples_holds_both():
    """Two of three answers to `a` are right and agree; at `b` the right one is outvoted."""
    a = [item("a", 0, True, "4"), item("a", 1, True, "4"), item("a", 2, False, "5")]
    b = [item("b", 0, True, "7"), item("b", 1, False, "8"), item("b", 2, False, "8")]
    shares = Evaluation(0, True, Profile(name="full"), (*a, *b)).summary().of_samples
    assert shares["pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    # a: of {4,4} {4,5} {4,5} right 1, 1/2, 1/2; b: {7,8} {7,8} {8,8} 1/2, 1/2, 0
    assert shares["maj@2"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert shares["maj@3"] == pytest.approx((1 + 0) / 2)
    wrong = Evaluation(0, True, Profile(name="f"), tuple(item("a", i, False, None) for i in range(2)))
    assert wrong.summary().of_samples["maj@2"] == 0.0  # whatever was read, no majority was right
    unread = [item("a", i, True, None) for i in range(2)]
    assert not any("maj" in name for name in Evaluation(0, True, Profile(name="f"), (*unread,)).summary().of_samples)
