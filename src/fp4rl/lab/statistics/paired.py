"""Two evaluations on the same problems: their difference with its interval, over problems alone.

It tells whether two precisions of one checkpoint, or two checkpoints, differ on such problems; whether recipes differ
needs seeds (`statistics.seeds`).
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from scipy import special

from fp4rl.lab.statistics.proportions import ShareDifference, mcnemar
from fp4rl.lab.statistics.seeds import LEVEL
from fp4rl.spec.errors import InvalidValueError


def paired(first: Sequence[float], second: Sequence[float]) -> ShareDifference:
    """Return mean(first) - mean(second), each value the share of right answers to one and the same problem.

    Where all values are 0 or 1, by `tango`. Else Student's paired t over problems; where no problem's share differs
    from another's by more or less than the rest, its interval would shrink to nothing, and is that of `tango`.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if {*first, *second} <= {0.0, 1.0}:
        return tango(differences.count(1.0), differences.count(-1.0), n)
    value, spread = fmean(differences), stdev(differences) if n > 1 else 0.0
    if not spread:
        still = tango(0, 0, n)
        return ShareDifference(value, max(-1.0, value + still.low), min(1.0, value + still.high), 1.0)
    error = spread / math.sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(value) / error))
    return ShareDifference(value, max(-1.0, value - half), min(1.0, value + half), p)


def tango(gained: int, lost: int, total: int) -> ShareDifference:
    """Return the difference of two shares of the same `total` problems: `gained` are solved by the first alone.

    Interval: the score interval of T. Tango, Statistics in Medicine 17 (1998): all differences that the score test does
    not reject. It does not shrink to nothing where no problem flips. p: McNemar's exact test.
    """
    if not (min(gained, lost) >= 0 and gained + lost <= total and total > 0):
        raise InvalidValueError(f"{gained} gained and {lost} lost of {total} is no comparison")
    value, z = (gained - lost) / total, float(special.ndtri((1 + LEVEL) / 2))

    def excess(difference: float) -> float:
        """Return how many standard errors the observed difference is above this one."""
        a, b = 2 * total, -gained - lost + (2 * total - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        second_alone = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest share, given it
        above, spread = gained - lost - total * difference, total * (2 * second_alone + difference * (1 - difference))
        return above / math.sqrt(spread) if spread > 0 else math.copysign(math.inf, above)

    low = value if value <= -1 else _root(lambda difference: excess(difference) - z, -1.0, value)
    high = value if value >= 1 else _root(lambda difference: excess(difference) + z, value, 1.0)
    return ShareDifference(value, low, high, mcnemar(gained, lost).p)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function passes 0 between `low` and `high`, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
