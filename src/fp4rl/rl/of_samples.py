"""What several answers to one problem say: whether any of k is right, and whether most of k are.

Both are exact for every k up to the number n of answers: the mean over all ways to draw k of the n, so that a small k
uses all answers. They are unbiased for k fresh answers.
"""

from collections.abc import Collection, Mapping
from math import comb


def pass_at(right: int, n: int, k: int) -> float:
    """Return the chance that one of `k` of `n` answers is right, of which so many are `right` (arXiv 2107.03374)."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority_at(votes: Mapping[str | None, int], right: Collection[str | None], k: int) -> float:
    """Return the chance that the most frequent of `k` answers, drawn without return from all `votes`, is a right one.

    `votes` counts equal answers. Answers that cannot be read (None) do not vote. Between equally frequent ones a lot is
    drawn.
    """
    counts = {answer: count for answer, count in votes.items() if answer is not None}
    blank = votes.get(None, 0)
    won = sum(
        _wins(counts[answer], [count for other, count in counts.items() if other != answer], blank, k)
        for answer in right
        if answer in counts
    )
    return won / comb(sum(counts.values()) + blank, k)


def _wins(own: int, others: Collection[int], blank: int, k: int) -> float:
    """Return the number of draws of `k` in which an answer given `own` times is the most frequent, a tie of t counted
    as one in t."""
    won = 0.0
    for most in range(1, min(own, k) + 1):
        # ways[drawn, ties]: draws of that many from the others, none more often than `most`, `ties` of them as often
        ways = {(drawn, 0): comb(blank, drawn) for drawn in range(min(blank, k) + 1)}
        for count in others:
            grown: dict[tuple[int, int], int] = {}
            for (drawn, ties), number in ways.items():
                for more in range(min(count, most, k - drawn) + 1):
                    key = drawn + more, ties + (more == most)
                    grown[key] = grown.get(key, 0) + number * comb(count, more)
            ways = grown
        won += comb(own, most) * sum(n / (1 + ties) for (drawn, ties), n in ways.items() if drawn == k - most)
    return won
