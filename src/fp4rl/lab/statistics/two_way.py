"""The cross-check that takes seeds and problems both as random: a t test with two-way variance."""

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from fp4rl.lab.statistics.seeds import Difference
from fp4rl.spec.errors import InvalidValueError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]


def two_way(treatment: "Scores", control: "Scores", level: float = 0.95) -> Difference:
    """Difference of means of two [seeds, problems] tables that share the problems (columns) and not the seeds.

    Its variance is V(seeds) + V(problems) - V(cell): what the seed means say, plus what the per-problem differences
    say, less the residual that both contain (two-way clustering: Cameron, Gelbach and Miller, 2011), never less than
    either. Degrees of freedom after Satterthwaite.
    Raises `InvalidValueError` unless the problems agree and each arm has two seeds.
    """
    if treatment.shape[1] != control.shape[1]:
        raise InvalidValueError(
            f"the arms answer {treatment.shape[1]} and {control.shape[1]} problems; they must be the same"
        )
    if min(len(treatment), len(control), treatment.shape[1]) < 2:
        raise InvalidValueError("a two-way test needs two seeds an arm and two problems")
    value = float(treatment.mean() - control.mean())
    seeds = [float(arm.mean(1).var(ddof=1)) / len(arm) for arm in (treatment, control)]
    problems = float((treatment.mean(0) - control.mean(0)).var(ddof=1)) / treatment.shape[1]
    total = max(sum(seeds) + problems - _cell(treatment) - _cell(control), sum(seeds), problems)
    if not total > 0:
        raise InvalidValueError("neither seeds nor problems vary, so chance cannot be measured")
    freedom = total**2 / (
        sum(part**2 / (len(arm) - 1) for part, arm in zip(seeds, (treatment, control), strict=True))
        + problems**2 / (treatment.shape[1] - 1)
    )
    error = math.sqrt(total)
    half = float(special.stdtrit(freedom, (1 + level) / 2)) * error
    p = 2 * float(special.stdtr(freedom, -abs(value) / error))
    return Difference(value, value - half, value + half, level, error, freedom, p, (len(treatment), len(control)))


def _cell(arm: "Scores") -> float:
    """The variance of the arm's mean that comes from the residual of seed and problem alone."""
    residual = arm - arm.mean(0) - arm.mean(1, keepdims=True) + arm.mean()
    freedom = (arm.shape[0] - 1) * (arm.shape[1] - 1)
    return float(np.square(residual).sum() / (freedom * arm.size))
