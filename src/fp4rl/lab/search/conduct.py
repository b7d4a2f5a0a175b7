"""A search from its first candidate to its verdict: each step is looked up in the records, or done and written there.

Every decision is a function of the records, so that a search that was killed goes on as if it had not been: the plan
is made once by the pace of the first runs, and the clock decides nothing after it, but where screening took longer
than planned and would take the time of the final.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from fp4rl.lab.search import planning, screening
from fp4rl.lab.search.beginning import begin
from fp4rl.lab.search.candidates import Recipes, changes
from fp4rl.lab.search.proposals import propose
from fp4rl.lab.search.records import (
    Added,
    Book,
    Chosen,
    Cut,
    Decided,
    Judged,
    Measured,
    Planned,
    Proposed,
    Spent,
)
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.space import Space
from fp4rl.spec.words import agreeing, counted


@dataclass(frozen=True)
class Cell:
    """A run that is asked for: a candidate, trained for so many steps from a seed."""

    candidate: Proposed
    steps: int
    seed: int

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from other runs of the search."""
        return self.candidate.number, self.steps, self.seed


class Bench(Protocol):
    """What runs the candidates: real runs, or a simulation of them."""

    def measure(self, cells: Sequence[Cell], title: str) -> list[Measured]:
        """Run cells of one seed, and return a line for each, in their order."""

    def stages_s(self, candidates: Sequence[Proposed]) -> float:
        """Return the seconds that all stages took that some candidates need, of one seed."""

    def run_final(self, chosen: Proposed, seeds: Sequence[int]) -> Judged:
        """Run the final of a candidate and its control over fresh seeds, and return its verdict."""

    def verdict(self, seeds: Sequence[int]) -> Judged:
        """Return the verdict by what of the final is finished."""


class OutOfTime(Exception):
    """The budget is used up, and what was running has ended at a checkpoint."""


class Stopwatch:
    """The budget of one session: what earlier ones used, and what this one did so far."""

    def __init__(self, used_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._before, self._now, self._began = used_s, now, now()

    @property
    def used_s(self) -> float:
        """Seconds used so far, all sessions together."""
        return self._before + self._now() - self._began


@dataclass
class Search:
    """One search: a space, its records, what runs its candidates, and a budget in seconds.

    `force` goes on where the budget does not hold the final over all seeds. `tell` is called with a line for the user
    at every step.
    """

    recipes: Recipes
    book: Book
    bench: Bench
    budget_s: float
    jobs: int = 2
    force: bool = False
    tell: Callable[[str], None] = lambda _: None
    watch: Stopwatch | None = None

    def __post_init__(self) -> None:
        self.watch = self.watch or Stopwatch(self.book.used_s)

    @property
    def space(self) -> Space:
        """The space that is searched."""
        return self.recipes.space

    @property
    def used_s(self) -> float:
        """Seconds used so far."""
        assert self.watch is not None
        return self.watch.used_s

    def run(self) -> Judged:
        """Run the search, or go on with it; return its verdict, without a word until all seeds of the plan are in.

        Raises InvalidValueError for records of another space or of other code and for a budget that does not hold the
        final (without `force`), CheckFailed where no candidate is left, and OutOfTime where the bench does, before the
        final.
        """
        self.begin()
        first = self.first()
        self._measure(first, 0, "the first candidates")
        plan = self.book.last(Planned) or self._plan(first)
        self._explore(plan)
        chosen = self._screen(plan)
        done = self.book.last(Judged)
        if done is not None and done.whole:
            return done
        number = next(line for line in self.book.of(Proposed) if line.number == chosen.candidate)
        self.tell(f"final: {number.words}, over {counted(len(plan.final_seeds), 'fresh seed')}")
        try:
            numbers = self.bench.run_final(number, plan.final_seeds)
        except OutOfTime:
            numbers = self.bench.verdict(plan.final_seeds)
        judged = numbers.over(plan.final_seeds)
        self.book.add(judged, Spent(used_s=self.used_s))
        return judged

    # -- what is tried

    def begin(self) -> None:
        """Write what is searched, or raise InvalidValueError for records of another space or of other code."""
        begin(self.space, self.book)

    def _batch(self, batch: int, count: int) -> list[Proposed]:
        """Return the candidates of a batch; what is not in the records yet is proposed and written."""
        lines = [line for line in self.book.of(Proposed) if line.batch == batch]
        if sum(line.refused is None for line in lines) < count:
            self.book.add(*propose(self.recipes, self.book, batch, count)[len(lines) :])
        return [line for line in self.book.candidates() if line.batch == batch]

    def _measure(self, candidates: Sequence[Proposed], number: int, title: str, seed: int | None = None) -> None:
        """Run what of a round is not in the records yet."""
        seeds, rungs = self.space.screening.seeds, self.space.screening.rungs
        cells = [Cell(candidate, rungs[number], seeds[0] if seed is None else seed) for candidate in candidates]
        missing = [cell for cell in cells if cell.key not in self.book.measured()]
        if missing:
            runs, steps = counted(len(missing), "run"), counted(missing[0].steps, "step")
            self.tell(f"{title}: {runs} of {steps}, seed {missing[0].seed}")
            measured = self.bench.measure(missing, title)
            if self.book.last(Planned) is None:
                _require_any(measured)
            self.book.add(*measured, Spent(used_s=self.used_s))

    def _plan(self, first: Sequence[Proposed]) -> Planned:
        """Write the plan, or refuse a budget that does not hold it."""
        runs = [line for line in self.book.of(Measured) if line.failed is None]
        if not runs:
            raise InvalidValueError("the space holds no candidate: report.html in its folder names why each is refused")
        stages_s = self.bench.stages_s(first)
        wave_s = self.used_s - (sum(run.run_s for run in runs) + stages_s) / self.jobs
        paces = [run.run_s / run.steps for run in runs]
        pace = planning.Pace.of(paces, stages_s, self._control_steps(first), wave_s)
        self.require_enough(pace)
        plan = planning.plan(self.space, pace, self.budget_s, self.used_s, self.jobs)
        self.book.add(plan)
        self.tell(f"plan: {plan.why}; about {plan.final_s / 60:.0f} min are kept for the final")
        return plan

    def require_enough(self, pace: planning.Pace) -> None:
        """Raise InvalidValueError for a budget too short for the first candidates and the whole final beside what is
        used already."""
        needed = planning.smallest_s(self.space, pace, self.jobs, self.used_s, len(self.book.of(Measured)))
        if needed > self.budget_s and not self.force:
            used = f" ({self.used_s / 60:.0f} of them used)" if self.used_s >= 60 else ""
            raise InvalidValueError(
                f"{self.budget_s / 60:.0f} minutes{used} with {counted(self.jobs, 'job')} do not hold a screening and "
                f"the final over all {len(self.space.final.seeds)} seeds: --budget {needed / 60 + 1:.0f}m would do, "
                "more jobs may; --force goes on with as many seeds as fit"
            )

    def expected(self, seconds: Mapping[str, float]) -> None:
        """Raise InvalidValueError for a budget too short by what earlier runs like these took: arm -> seconds."""
        first, steps = self.first(), self.space.screening.rungs[0]
        paces = [seconds[own.name] / steps for own in first]
        stages = sum(own for arm, own in seconds.items() if arm in self.space.stages)
        self.require_enough(planning.Pace.of(paces, stages, self._control_steps(first)))

    def first(self) -> list[Proposed]:
        """Return the candidates that the plan is made by."""
        return self._batch(0, planning.FIRST)

    def _control_steps(self, candidates: Sequence[Proposed]) -> float:
        """Return the steps of the dearest control for each step of a recipe: it trains as long as all stages."""
        needed = [self.recipes.needed([changes(self.space, own.point)]) for own in candidates]
        stages = [sum(self.recipes.stages[arm].training.steps for arm in own) for own in needed]
        return 1 + max(stages, default=0) / self.space.screening.rungs[-1]

    def _explore(self, plan: Planned) -> None:
        """Measure the first round: what is left of a grid at once, or batches of TPE."""
        wanted = plan.rounds[0].candidates
        batch = 1
        while (count := len([own for own in self.book.candidates() if own.batch < batch])) < wanted:
            if self._cut(plan, 0, any(own.batch == batch for own in self.book.of(Proposed))):
                return
            size = wanted - count
            own = self._batch(batch, size if self.space.sampler == "grid" else min(size, planning.BATCH))
            if not own:
                return
            self._measure(own, 0, f"round 1 of {len(plan.rounds)}")
            batch += 1

    # -- what is dropped

    def _screen(self, plan: Planned) -> Chosen:
        """Carry out the rounds; return the candidate that is left."""
        alive, number = [line.number for line in self.book.candidates()], 0
        for number in range(len(plan.rounds)):
            if number and self._cut(plan, number, self._measured_in(number)):
                number -= 1
                break
            title = f"round {number + 1} of {len(plan.rounds)}"
            self._measure(self._named(alive), number, title)
            keep = plan.rounds[number + 1].candidates if number + 1 < len(plan.rounds) else 1
            alive = list(self._decide(plan, number, alive, keep).kept)
            if not alive:
                raise CheckFailed("no candidate is left: all runs of a round failed; `fp4rl runs` names why")
        done = self.book.last(Chosen)
        if done is None:
            done = screening.chosen(self.space, self.book, number, alive)
            self.book.add(done)
        return done

    def _decide(self, plan: Planned, number: int, alive: Sequence[int], keep: int) -> Decided:
        """End a round: further seeds for those that are close to the cut, then who goes on."""
        done = next((line for line in self.book.of(Decided) if line.round == number), None)
        if done is not None:
            return done
        left = plan.rounds[number].extra
        further = self.space.screening.seeds[1:]
        for done_before, seed in enumerate(further):
            more = next((own for own in self.book.of(Added) if (own.round, own.seed) == (number, seed)), None)
            if more is None:
                share = ceil(left / (len(further) - done_before)) if number + 1 == len(plan.rounds) else left
                more = screening.added(self.space, self.book, number, seed, alive, keep, share)
                if more is None:
                    break
                self.book.add(more)
            title = f"round {number + 1} of {len(plan.rounds)}, close candidates"
            self._measure(self._named(more.candidates), number, title, seed)
            left -= len(more.candidates)
        done = screening.decided(self.space, self.book, number, alive, keep)
        self.book.add(done)
        names = ", ".join(own.name for own in self._named(done.kept))
        self.tell(f"round {number + 1}: {names} {agreeing(len(done.kept), 'goes', 'go')} on")
        return done

    def _named(self, numbers: Sequence[int]) -> list[Proposed]:
        known = {line.number: line for line in self.book.candidates()}
        return [known[own] for own in numbers]

    def _measured_in(self, number: int) -> bool:
        """Whether a round has begun."""
        steps = self.space.screening.rungs[number]
        return any(line.steps == steps for line in self.book.of(Measured))

    def _cut(self, plan: Planned, number: int, begun: bool) -> bool:
        """Return whether screening ends before these runs: what is left of the budget is the final's."""
        if any(line.round == number for line in self.book.of(Cut)):
            return True
        runs = plan.rounds[number].candidates if number else planning.BATCH
        next_s = plan.pace_s * plan.rounds[number].steps * runs / plan.jobs
        if begun or self.used_s + next_s + plan.final_s <= self.budget_s:
            return False
        left = max(0.0, self.budget_s - self.used_s)
        why = f"{left / 60:.0f} min were left, which the final needs: the runs took longer than planned"
        self.book.add(Cut(round=number, why=why))
        self.tell(f"screening ends before round {number + 1}: {why}")
        return True


def _require_any(measured: Sequence[Measured]) -> None:
    """Raise where all of the first candidates failed, before that is recorded: the same command tries them again."""
    if any(line.failed is None for line in measured):
        return
    error = InvalidValueError if all(line.mistake for line in measured) else CheckFailed
    raise error(f"none of the first candidates ran: {measured[0].failed}")
