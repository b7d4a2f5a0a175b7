"""The cross-check that draws seeds and problems anew: the Multi-Bootstrap of Sellam et al. (arXiv 2106.16163)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fp4rl.spec.errors import InvalidValueError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Bootstrapped:
    """`value` = difference of means; percentile interval; p = twice the smaller tail of the draws at zero."""

    value: float
    low: float
    high: float
    level: float
    p: float
    draws: int


def multi_bootstrap(
    treatment: "Scores", control: "Scores", *, generator: np.random.Generator, draws: int = 2000, level: float = 0.95
) -> Bootstrapped:
    """Unpaired seeds, paired problems: each draw takes seeds of each arm, and one set of problems, with replacement.

    `treatment`, `control`: [seeds, problems] with the same problems. Both resamplings carry the chance of single
    answers, so it is cautious where that dominates; where seeds dominate and are few, its percentile interval is too
    narrow. It is a cross-check, never the verdict.
    """
    if treatment.shape[1] != control.shape[1]:
        raise InvalidValueError(
            f"the arms answer {treatment.shape[1]} and {control.shape[1]} problems; they must be the same"
        )
    per_problem = _drawn(treatment, draws, generator) - _drawn(control, draws, generator)  # [draws, problems]
    problems = per_problem.shape[1]
    weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=draws) / problems
    found = np.einsum("dp,dp->d", per_problem, weights)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    tail = min((found <= 0).mean(), (found >= 0).mean())
    value = float(treatment.mean() - control.mean())
    return Bootstrapped(value, float(low), float(high), level, min(1.0, max(2 * float(tail), 1 / draws)), draws)


def _drawn(arm: "Scores", draws: int, generator: np.random.Generator) -> "Scores":
    """The mean over a resample of the arm's seeds, for every draw and problem: [draws, problems]."""
    seeds = len(arm)
    weights: Scores = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    return weights @ arm
