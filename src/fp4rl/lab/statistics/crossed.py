"""Cross-checks that take both seeds and problems as random. They confirm or warn; the verdict is over seeds alone.

Both take two tables of scores, [seeds, problems], with the same problems (columns) and different seeds.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fp4rl.lab.statistics.seeds import LEVEL, Difference, student_t
from fp4rl.spec.errors import InvalidValueError

Scores = NDArray[np.float64]  # [seeds, problems]


@dataclass(frozen=True)
class Bootstrapped:
    """A difference of means, its percentile interval, and p, twice the smaller tail of the draws at zero."""

    value: float
    low: float
    high: float
    level: float
    p: float
    draws: int


def multi_bootstrap(
    treatment: Scores, control: Scores, *, generator: np.random.Generator, draws: int = 2000
) -> Bootstrapped:
    """Resample seeds (unpaired) and problems (paired): the Multi-Bootstrap of Sellam et al., arXiv 2106.16163.

    Each draw takes seeds of each arm, and one set of problems for both, with replacement. Both resamplings include the
    variance of single answers, so it is conservative where that dominates; where few seeds dominate, its percentile
    interval is too narrow. Raises `InvalidValueError` unless the problems are the same.
    """
    _check_problems(treatment, control)
    per_problem = _drawn(treatment, draws, generator) - _drawn(control, draws, generator)  # [draws, problems]
    problems = per_problem.shape[1]
    weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=draws) / problems
    differences = np.einsum("dp,dp->d", per_problem, weights)  # [draws]
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min((differences <= 0).mean(), (differences >= 0).mean())
    value = float(treatment.mean() - control.mean())
    return Bootstrapped(value, float(low), float(high), LEVEL, min(1.0, max(2 * float(tail), 1 / draws)), draws)


def _drawn(arm: Scores, draws: int, generator: np.random.Generator) -> Scores:
    """Return the mean over a resample of the arm's seeds, for every draw and problem: [draws, problems]."""
    seeds = len(arm)
    weights: Scores = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    return weights @ arm


def two_way(treatment: Scores, control: Scores) -> Difference:
    """Test the difference of means with the variance of both seeds and problems (two-way clustering).

    The variance is V(seeds) + V(problems) - V(cell): that of the seed means, plus that of the per-problem differences,
    less the residual that both contain, and at least each of them (Cameron, Gelbach and Miller, J. of Business and
    Economic Statistics 29 (2011)). Degrees of freedom after Satterthwaite.
    Raises `InvalidValueError` unless the problems are the same and each arm has two seeds, and where nothing varies.
    """
    _check_problems(treatment, control)
    if min(len(treatment), len(control), treatment.shape[1]) < 2:
        raise InvalidValueError("a two-way test needs two seeds an arm and two problems")
    value = float(treatment.mean() - control.mean())
    seeds = [float(arm.mean(1).var(ddof=1)) / len(arm) for arm in (treatment, control)]
    problems = float((treatment.mean(0) - control.mean(0)).var(ddof=1)) / treatment.shape[1]
    # Estimates can make the sum smaller than one of its parts, which would be too confident.
    total = max(sum(seeds) + problems - _cell(treatment) - _cell(control), sum(seeds), problems)
    if not varying(treatment, control):
        raise InvalidValueError("neither seeds nor problems vary, so chance cannot be measured")
    freedom = total**2 / (
        sum(part**2 / (len(arm) - 1) for part, arm in zip(seeds, (treatment, control), strict=True))
        + problems**2 / (treatment.shape[1] - 1)
    )
    return student_t(value, math.sqrt(total), freedom, (len(treatment), len(control)))


def varying(treatment: Scores, control: Scores) -> bool:
    """Return whether a seed differs from another within its arm, or a problem from another in what the arms differ."""
    spreads = (np.ptp(treatment.mean(1)), np.ptp(control.mean(1)), np.ptp(treatment.mean(0) - control.mean(0)))
    return any(spread > 0 for spread in spreads)


def _cell(arm: Scores) -> float:
    """Return the variance of the arm's mean that comes from the residual of seed and problem alone."""
    residual = arm - arm.mean(0) - arm.mean(1, keepdims=True) + arm.mean()
    freedom = (arm.shape[0] - 1) * (arm.shape[1] - 1)
    return float(np.square(residual).sum() / (freedom * arm.size))


def _check_problems(treatment: Scores, control: Scores) -> None:
    first, second = treatment.shape[1], control.shape[1]
    if first != second:
        raise InvalidValueError(f"the arms answer {first} and {second} problems; they must be the same")
