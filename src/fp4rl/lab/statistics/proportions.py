"""Shares of problems solved, with intervals over problems alone: for published totals, and for two checkpoints.

They tell how precisely a *checkpoint* is measured, or whether two checkpoints differ, but not whether the recipes
behind them differ: that needs seeds (`statistics.seeds`).
"""

import math
from dataclasses import dataclass

from scipy import special

from fp4rl.lab.statistics.seeds import LEVEL
from fp4rl.spec.errors import InvalidValueError


@dataclass(frozen=True)
class ShareDifference:
    """First share - second share, with its interval over problems and the p of 'the shares are equal'."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class PairedFlips:
    """McNemar's test on the same problems: `gained` are solved only by the first, `lost` only by the second."""

    gained: int
    lost: int
    p: float


def wilson(solved: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share. Raises `InvalidValueError` unless 0 <= solved <= total > 0.

    `solved` may be a sum of shares, such as pass@k of each problem: a mean of values between 0 and 1 varies at most as
    much as a share of the same size, so that the interval is then wide enough, never too narrow.
    """
    if not (0 <= solved <= total and total > 0):
        raise InvalidValueError(f"{solved} solved of {total} is no share")
    z = float(special.ndtri((1 + LEVEL) / 2))
    share = solved / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def newcombe(first: tuple[int, int], second: tuple[int, int]) -> ShareDifference:
    """Return the difference of two independent shares (solved, total).

    Interval: Newcombe, Statistics in Medicine 17 (1998), method 10 (hybrid of two Wilson intervals). p: the pooled
    two-sample z test. For shares of the same problems it is wide: pairing needs the items.
    """
    (share_1, low_1, high_1), (share_2, low_2, high_2) = ((s / n, *wilson(s, n)) for s, n in (first, second))
    value = share_1 - share_2
    low = value - math.hypot(share_1 - low_1, high_2 - share_2)
    high = value + math.hypot(high_1 - share_1, share_2 - low_2)
    together = (first[0] + second[0]) / (first[1] + second[1])
    error = math.sqrt(together * (1 - together) * (1 / first[1] + 1 / second[1]))
    p = 2 * float(special.ndtr(-abs(value) / error)) if error else 1.0
    return ShareDifference(value, low, high, p)


def mcnemar(gained: int, lost: int) -> PairedFlips:
    """Test exactly (McNemar) whether gains and losses of two *checkpoints* on the same problems are equally likely."""
    flips = gained + lost
    tail = float(special.bdtr(min(gained, lost), flips, 0.5)) if flips else 1.0
    return PairedFlips(gained, lost, min(1.0, 2 * tail))
