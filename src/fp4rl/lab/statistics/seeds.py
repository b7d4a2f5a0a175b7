"""Two arms compared over training seeds: the difference of seed means with a Welch interval, and Holm's correction.

Results are in the unit of the inputs, such as points. The seed is the unit of replication, because two runs that differ
only in the seed differ by more than the sampling of problems explains: a test that takes only the problems as random
calls that an effect in 20 to 25 % of comparisons (docs/concepts/statistics.md).
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from scipy import special

from fp4rl.spec.errors import InvalidValueError

LEVEL = 0.95  # of every interval; a test's alpha is what is left


@dataclass(frozen=True)
class Difference:
    """mean(treatment) - mean(control), with its two-sided interval and the p of 'there is no difference'."""

    value: float
    low: float
    high: float
    level: float
    standard_error: float
    freedom: float
    p: float
    seeds: tuple[int, int]  # treatment, control


@dataclass(frozen=True)
class NotWorse:
    """Non-inferiority: the one-sided lower bound of the difference, and the p of 'worse by the margin or more'."""

    margin: float
    lower_bound: float
    p: float

    @property
    def clears(self) -> bool:
        """Whether the bound is above -margin, before any correction."""
        return self.lower_bound > -self.margin


def welch(treatment: Sequence[float], control: Sequence[float]) -> Difference:
    """Test the difference of seed means by Welch's t: one value per seed, spreads need not be equal.

    Raises `InvalidValueError` with fewer than two seeds an arm, and where all seeds of an arm are equal (no variance
    can be estimated). Source: B. L. Welch, Biometrika 34 (1947); degrees of freedom after Satterthwaite.
    """
    error, freedom = standard_error(treatment, control)
    return student_t(fmean(treatment) - fmean(control), error, freedom, (len(treatment), len(control)))


def student_t(value: float, error: float, freedom: float, seeds: tuple[int, int]) -> Difference:
    """Return the two-sided t test of a difference with its standard error and degrees of freedom."""
    half = float(special.stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(freedom, -abs(value) / error))
    return Difference(value, value - half, value + half, LEVEL, error, freedom, p, seeds)


def not_worse(treatment: Sequence[float], control: Sequence[float], margin: float) -> NotWorse:
    """Test whether the treatment is less than `margin` worse: Welch's one-sided lower bound must lie above -margin.

    Raises `InvalidValueError` for a margin that is not positive, and as `welch` does.
    """
    if not margin > 0:
        raise InvalidValueError(f"a margin of non-inferiority is a positive number fixed beforehand; got {margin}")
    value = fmean(treatment) - fmean(control)
    error, freedom = standard_error(treatment, control)
    bound = value - float(special.stdtrit(freedom, LEVEL)) * error
    return NotWorse(margin, bound, float(special.stdtr(freedom, -(value + margin) / error)))


def standard_error(treatment: Sequence[float], control: Sequence[float]) -> tuple[float, float]:
    """Return SE, SE^2 = s1^2/n1 + s2^2/n2, and Satterthwaite's degrees of freedom, SE^4 / sum((s^2/n)^2 / (n - 1))."""
    if min(len(treatment), len(control)) < 2:
        raise InvalidValueError(f"a test over seeds needs two seeds an arm; got {len(treatment)} and {len(control)}")
    parts = [variance(arm) / len(arm) for arm in (treatment, control)]
    total = sum(parts)
    if not total > 0:
        raise InvalidValueError("no seed differs from another in either arm, so chance cannot be measured")
    shares = (part**2 / (len(arm) - 1) for part, arm in zip(parts, (treatment, control), strict=True))
    return math.sqrt(total), total**2 / sum(shares)


@dataclass(frozen=True)
class Spread:
    """A standard deviation pooled over groups of repeats, with its degrees of freedom."""

    sd: float
    freedom: int
    groups: int

    def band(self, seeds: tuple[int, int]) -> float:
        """Return half the width of the band that holds 95 % of the differences of two equal arms."""
        quantile = float(special.stdtrit(self.freedom, (1 + LEVEL) / 2))
        return quantile * self.sd * math.sqrt(1 / seeds[0] + 1 / seeds[1])


def pooled(groups: Iterable[Sequence[float]]) -> Spread | None:
    """Pool the spread over groups of repeats (one value per seed of one experiment); None where no group has two."""
    repeats = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeats)
    if not freedom:
        return None
    squares = math.fsum(variance(group) * (len(group) - 1) for group in repeats)
    return Spread(math.sqrt(squares / freedom), freedom, len(repeats))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down method, in order (S. Holm, Scandinavian Journal of Statistics 6 (1979))."""
    return list(holm_grouped({(index,): p for index, p in enumerate(p_values)}).values())


def holm_grouped(p_values: Mapping[tuple[Hashable, ...], float]) -> dict[tuple[Hashable, ...], float]:
    """Correct (Holm) hypotheses keyed (comparison, question), of which at most one in a comparison can be true.

    'No difference' and 'worse by the margin' cannot both be true, so each step divides by the number of *comparisons*
    that still have an open hypothesis, not by the number of hypotheses (Shaffer, JASA 81 (1986), logically related
    hypotheses). With one question each this is exactly Holm's correction.
    """
    corrected: dict[tuple[Hashable, ...], float] = {}
    open_keys = sorted(p_values, key=lambda key: p_values[key])
    floor = 0.0
    while open_keys:
        comparisons = len({key[0] for key in open_keys})
        key = open_keys.pop(0)
        floor = max(floor, min(1.0, p_values[key] * comparisons))
        corrected[key] = floor
    return {key: corrected[key] for key in p_values}
