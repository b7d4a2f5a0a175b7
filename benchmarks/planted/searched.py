"""Searches whose truth is known: the real logic of a search over runs, and with a clock, that are made up.

Problems have known difficulties, training seeds a known spread (`made_up.World`); what a recipe is worth is planted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from fp4rl.lab.criteria import Comparison, evaluate_family
from fp4rl.lab.search.candidates import Recipes
from fp4rl.lab.search.conduct import Cell, Search, Stopwatch
from fp4rl.lab.search.records import Book, Judged, Measured, Proposed
from fp4rl.spec.space import Space
from planted.made_up import World, make_world

SPREAD = 1.5  # points between repeats of a run on 500 problems, as in real runs
# Mean 0.92 and E[p (1 - p)] = 0.03, as of the embedded model after 60 steps.
DIFFICULTY = (0.633, 0.055)
PROBLEMS = {"screening": 200, "final": 500}
STEP_S, AROUND_S = 1.0, 5.0  # seconds of a step, and of a run around its steps


def space_of(grid: Sequence[int], **screening: Any) -> Space:
    """A space of learning rates, clipping, decay and so on, with so many choices each; they have no meaning here."""
    keys = ("lr", "weight_decay", "grad_clip", "clip_ratio_high", "temperature")
    choices = {
        f"training.{key}": [round(0.1 * (n + 1), 1) for n in range(count)]
        for key, count in zip(keys, grid, strict=False)
    }
    return Space.model_validate(
        {
            "search": "made-up",
            "base": {"injection": "w4a4"},
            "space": choices,
            "screening": {"rungs": [20, 60], "count": PROBLEMS["screening"], **screening},
            "final": {"seeds": list(range(101, 108)), "count": PROBLEMS["final"], "margin": 0.01},
        }
    )


@dataclass
class MadeUp:
    """A bench of made-up runs: `worth` says by how many points a recipe is better than the control, at the last rung.

    At an earlier rung differences are `early` of that. KL tells nothing about the recipe, unless `telling`. `shared`:
    the standard deviation, in points, of what a training seed does to all recipes alike.
    """

    space: Space
    worth: Callable[[Mapping[str, str | float]], float]
    seed: int = 0
    early: float = 0.6
    telling: bool = False
    shared: float = 0.0
    clock_s: float = 0.0
    jobs: int = 2
    worlds: dict[str, World] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 7])
        final = make_world(rng, PROBLEMS["final"], SPREAD, DIFFICULTY)
        others = make_world(rng, PROBLEMS["screening"], SPREAD, DIFFICULTY)
        self.worlds = {"final": final, "screening": World(others.logits, final.seed_sd)}

    def measure(self, cells: Sequence[Cell], title: str) -> list[Measured]:  # noqa: ARG002
        self.clock_s += sum(AROUND_S + STEP_S * cell.steps for cell in cells) / self.jobs
        return [self._measured(cell) for cell in cells]

    def _measured(self, cell: Cell) -> Measured:
        # The same run has the same numbers, whenever it is run: a search that was killed meets them again.
        rng = np.random.default_rng([self.seed, cell.candidate.number, cell.steps, cell.seed])
        share = 1.0 if cell.steps == self.space.screening.rungs[-1] else self.early
        points = share * self.worth(cell.candidate.point)
        common = self.shared * np.random.default_rng([self.seed, cell.seed, 77]).normal()
        solved = self._runs(rng, "screening", 1, points + common)[0]
        kl = float(np.exp(rng.normal(-4.0 - (0.3 * points if self.telling else 0.0), 0.3)))
        return Measured(
            candidate=cell.candidate.number,
            steps=cell.steps,
            seed=cell.seed,
            run="made up",
            solved=tuple(int(own > 0) for own in solved),
            kl=kl,
            bits=(4.25, 4.25),
            step_s=STEP_S,
            run_s=AROUND_S + STEP_S * cell.steps,
        )

    def _runs(self, rng: np.random.Generator, which: str, count: int, points: float) -> "np.ndarray[Any, Any]":
        world = self.worlds[which]
        slope = float((special.expit(world.logits) * special.expit(-world.logits)).mean())
        return world.runs(rng, count, points / 100 / slope)

    def stages_s(self, candidates: Sequence[Proposed]) -> float:  # noqa: ARG002
        return 0.0

    def run_final(self, chosen: Proposed, seeds: Sequence[int]) -> Judged:
        self.clock_s += 2 * len(seeds) * (AROUND_S + STEP_S * self.space.screening.rungs[-1]) / self.jobs
        rng = np.random.default_rng([self.seed, 999, *seeds])
        sides = [
            tuple(self._runs(rng, "final", len(seeds), points).mean(1).tolist())
            for points in (self.worth(chosen.point), 0.0)
        ]
        margin = 100 * self.space.final.margin
        (own,) = evaluate_family([Comparison("made up", *sides, margin)])
        return Judged(
            word=own.word,
            sentence=own.sentence(),
            treatment=sides[0],
            control=sides[1],
            seeds=tuple(seeds),
            margin=margin,
            difference=own.difference,
            low=own.low,
            high=own.high,
        )

    def verdict(self, seeds: Sequence[int]) -> Judged:  # noqa: ARG002
        raise AssertionError("the made-up budget is never used up")


def search(bench: MadeUp, book: Book, budget_s: float = 3600.0) -> Search:
    """A search by such a bench, whose clock is the bench's."""
    watch = Stopwatch(book.used_s, lambda: bench.clock_s)
    return Search(Recipes(bench.space), book, bench, budget_s, bench.jobs, watch=watch)
