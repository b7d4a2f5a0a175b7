"""Comparisons whose truth is known: runs made up from problems of known difficulty and seeds of known spread.

How the tests of this package behave is measured here, not assumed; the table stands in docs/concepts/statistics.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from fp4rl.lab.criteria import Comparison, evaluate_family
from fp4rl.lab.statistics.seeds import welch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Mean 0.7 and E[p (1 - p)] = 0.12: most problems are easy or hopeless, so that one run of 1,319 problems has a chance
# of its own of 0.95 points, less than the 1.5 points by which repeats differ.
_DIFFICULTY = (0.933, 0.4)


@dataclass(frozen=True)
class World:
    """Problems with fixed difficulties, and training seeds that shift the skill of a run.

    `logits` [problems]; a run solves problem j with probability sigmoid(logits[j] + arm's shift + seed's shift), where
    the seed's shift is normal with standard deviation `seed_sd`.
    """

    logits: "Floats"
    seed_sd: float

    def runs(self, rng: np.random.Generator, count: int, shift: float = 0.0) -> "Floats":
        """`count` runs of one arm: [count, problems], 100 for solved and 0 for not, so that means are points."""
        skill = shift + rng.normal(0.0, self.seed_sd, size=(count, 1))
        solved = rng.random((count, len(self.logits))) < special.expit(self.logits + skill)
        return np.where(solved, 100.0, 0.0)

    def expected(self, shift: float) -> float:
        """The accuracy in points that runs of an arm have on average (Gauss-Hermite over the seeds)."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(21)
        skills = special.expit(self.logits[:, None] + shift + self.seed_sd * nodes).mean(0)
        return float(100 * skills @ weights / weights.sum())

    def shift_for(self, difference: float) -> float:
        """The shift of an arm that is `difference` points better than an arm without shift."""
        low, high, target = -3.0, 3.0, self.expected(0.0) + difference
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.expected(middle) < target else (low, middle)
        return low


def make_world(
    rng: np.random.Generator,
    problems: int = 1319,
    spread: float = 1.5,
    difficulty: tuple[float, float] = _DIFFICULTY,
) -> World:
    """A world in which repeats of a run have the standard deviation `spread` in points, chance of problems included;
    `difficulty`: of the beta distribution of the chances to solve a problem."""
    chances = np.clip(rng.beta(*difficulty, size=problems), 1e-4, 1 - 1e-4)
    # d accuracy / d skill; divided by the number of problems, also the variance that the problems alone give one run.
    slope = float((chances * (1 - chances)).mean())
    of_seeds = max((spread / 100) ** 2 - slope / problems, 0.0) ** 0.5
    return World(special.logit(chances), of_seeds / slope)


def share_called(
    world: World, rng: np.random.Generator, test: Callable[["Floats", "Floats"], float], seeds: int, tries: int
) -> float:
    """How often `test` (two [seeds, problems] tables -> p) calls a difference between arms that are the same."""
    calls = (test(world.runs(rng, seeds), world.runs(rng, seeds)) <= 0.05 for _ in range(tries))
    return sum(calls) / tries


def coverage(world: World, rng: np.random.Generator, difference: float, seeds: int, tries: int) -> float:
    """How often the 95 % Welch interval over seeds holds the true difference."""
    shift = world.shift_for(difference)
    held = 0
    for _ in range(tries):
        found = welch(_points(world.runs(rng, seeds, shift)), _points(world.runs(rng, seeds)))
        held += found.low <= difference <= found.high
    return held / tries


def families_with_a_false_word(
    world: World, rng: np.random.Generator, arms: int, seeds: int, tries: int, margin: float | None = None
) -> float:
    """How often at least one of `arms` comparisons with one control earns a word that is false, Holm applied.

    Without a margin all arms equal the control, so `better` and `worse` are false. With one every arm is worse by
    exactly the margin, so `reaches` and `better` are false.
    """
    shift = world.shift_for(-margin) if margin is not None else 0.0
    false_words = ("reaches", "better") if margin is not None else ("better", "worse")
    wrong = 0
    for _ in range(tries):
        control = _points(world.runs(rng, seeds))
        family = [Comparison(str(arm), _points(world.runs(rng, seeds, shift)), control, margin) for arm in range(arms)]
        wrong += any(verdict.word in false_words for verdict in evaluate_family(family))
    return wrong / tries


def _points(runs: "Floats") -> tuple[float, ...]:
    return tuple(runs.mean(1).tolist())
