"""Candidates as runs: an ordinary suite for screening and another for the final, below the folder of all runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun, planned
from fp4rl.lab.runner import Outcome, SuiteOutcome
from fp4rl.lab.runs import Run, read_run
from fp4rl.lab.search.candidates import Recipes, changes
from fp4rl.lab.search.conduct import Cell
from fp4rl.lab.search.final import final_suite, verdict
from fp4rl.lab.search.records import Book, Judged, Measured, Proposed, called
from fp4rl.lab.suites import read_suite
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.experiment import Suite
from fp4rl.spec.formats import format_of
from fp4rl.spec.load import merge
from fp4rl.spec.records import Sites

_UNROUNDED = 16.0  # bits of what has no format

# Runs the named arms of a suite with the named seeds, and returns their outcomes.
RunSuite = Callable[[Suite, Sequence[str], Sequence[int]], SuiteOutcome]


@dataclass
class Runs:
    """The bench of real runs below `root`; `run_suite` runs what of a suite is not finished."""

    recipes: Recipes
    book: Book
    root: Path
    run_suite: RunSuite

    @property
    def screen(self) -> str:
        """The name of the suite of screening."""
        return f"{self.recipes.space.search}-screen"

    @property
    def final(self) -> str:
        """The name of the suite of the final."""
        return f"{self.recipes.space.search}-final"

    def measure(self, cells: Sequence[Cell], title: str) -> list[Measured]:  # noqa: ARG002 - the caller tells it
        """Run cells of one seed as arms of the screening suite; one that failed is tried once more."""
        arms = {_arm(cell.candidate.number, cell.steps): self._content(cell) for cell in cells}
        seed = cells[0].seed
        suite = self._screening(arms, seed)
        names = [*self.recipes.needed(arms.values()), *arms]
        runs = {run.arm: run for run in planned(suite) if run.seed == seed}
        for _ in range(2):
            failed = self.run_suite(suite, names, [seed]).failed
            if all(ended.mistake for ended in failed):
                break
        why = {ended.run.arm: ended for ended in failed}
        return [self._measured(cell, runs[_arm(cell.candidate.number, cell.steps)], why) for cell in cells]

    def planned(self, candidates: Sequence[Proposed]) -> tuple[PlannedRun, ...]:
        """Return the runs of the first round of candidates, with their stages; arms are called by the candidates."""
        first = self.recipes.space.screening
        arms = {own.name: self._content(Cell(own, first.rungs[0], first.seeds[0])) for own in candidates}
        return planned(self.recipes.suite(self.screen, arms, first.seeds[:1], self._judging))

    @property
    def _judging(self) -> dict[str, Any]:
        space = self.recipes.space
        return {"split": space.screening.split, "count": space.screening.count, "profiles": [space.judged], "kl": True}

    def _content(self, cell: Cell) -> dict[str, Any]:
        return merge(changes(self.recipes.space, cell.candidate.point), {"training": {"steps": cell.steps}})

    def _screening(self, arms: Mapping[str, Mapping[str, Any]], seed: int) -> Suite:
        """Return the suite of everything that was screened so far, and of these arms."""
        space, known = self.recipes.space, {line.number: line for line in self.book.candidates()}
        earlier = {
            _arm(line.candidate, line.steps): self._content(Cell(known[line.candidate], line.steps, line.seed))
            for line in self.book.of(Measured)
        }
        seeds = [own for own in space.screening.seeds if own == seed or own in self._seeds_used]
        suite = self.recipes.suite(self.screen, earlier | dict(arms), seeds, self._judging)
        about = f"Screening of the search {space.search}: arms are candidates by number and steps. It judges nothing."
        return suite.model_copy(update={"about": about})

    @property
    def _seeds_used(self) -> set[int]:
        return {line.seed for line in self.book.of(Measured)}

    def _measured(self, cell: Cell, run: PlannedRun, why: Mapping[str, Outcome]) -> Measured:
        folder = run_folder(self.root, run.suite, run.run_id)
        plain = Measured(candidate=cell.candidate.number, steps=cell.steps, seed=cell.seed, run=folder.key)
        if not folder.finished:
            ended = why.get(run.arm)
            failed = str(ended.error) if ended is not None else folder.failure or "it did not finish"
            return plain.extended(failed=failed, mistake=ended is not None and ended.mistake)
        done = read_run(folder, curves=False)
        evaluation = done.evaluations().get(self.recipes.space.judged)
        if evaluation is None or done.gaps:
            return plain.extended(failed="; ".join(done.gaps) or "it ended without the evaluation that is judged")
        solved, samples = _solved(done, evaluation)
        seconds, steps = done.result.wall_s or 0.0, done.result.steps_done or cell.steps
        return plain.extended(
            solved=solved,
            samples=samples,
            kl=evaluation.kl,
            bits=_bits(done.sites),
            step_s=round(seconds / steps, 4),
            run_s=seconds,
        )

    def stages_s(self, candidates: Sequence[Proposed]) -> float:
        """Return the seconds that the stages of these candidates took, of the first screening seed."""
        arms = self.recipes.needed([changes(self.recipes.space, own.point) for own in candidates])
        if not arms:
            return 0.0
        runs = read_suite(self.root / self.screen, curves=False).runs
        took = [own.run.result.wall_s or 0.0 for own in runs if own.run is not None and own.planned.arm in arms]
        return sum(took) / max(len(self._seeds_used), 1)

    def run_final(self, chosen: Proposed, seeds: Sequence[int]) -> Judged:
        """Run the final, seed by seed, and return its verdict."""
        suite = final_suite(self.recipes, chosen, seeds, self.final)
        if any(not ended.mistake for ended in self.run_suite(suite, [], []).failed):
            self.run_suite(suite, [], [])  # those that failed, once more
        return self.verdict(seeds)

    def verdict(self, seeds: Sequence[int]) -> Judged:
        """Return the verdict by what of the final is finished."""
        return verdict(self.recipes.space, read_suite(self.root / self.final, curves=False), seeds)


def _arm(number: int, steps: int) -> str:
    return f"{called(number)}-{steps}"


def _solved(run: Run, evaluation: Evaluation) -> tuple[tuple[int, ...], int]:
    """Return how many samples of each problem were solved, in the order of their ids, and the number of samples."""
    assert run.folder is not None
    rows = run.folder.items(evaluation.step, evaluation.profile.name, ["problem_id", "strict"]).to_pylist()
    by_problem: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: str(row["problem_id"])):
        by_problem[row["problem_id"]] = by_problem.get(row["problem_id"], 0) + bool(row["strict"])
    return tuple(by_problem.values()), len(rows) // max(len(by_problem), 1)


def _bits(sites: Sites) -> tuple[float, float] | None:
    """Return the mean bits of a weight, and of an input weighted by the weights it meets; None without a table."""
    rows = [(own.shape, own.weight, own.input) for own in sites.plans or () if own.kind == "linear"]
    rows += [(own.shape, None, None) for own in sites.left_out if own.kind == "linear"]
    whole = sum(prod(shape) for shape, _, _ in rows)
    if not whole:
        return None
    weights, inputs = (
        sum(prod(shape) * _bits_of(own[part], (1, *shape)[-1]) for shape, *own in rows) / whole for part in (0, 1)
    )
    return round(weights, 3), round(inputs, 3)


def _bits_of(described: Any, columns: int) -> float:
    if described is None:
        return _UNROUNDED
    fmt = format_of(described)
    return fmt.bits_once * fmt.passes(columns)
