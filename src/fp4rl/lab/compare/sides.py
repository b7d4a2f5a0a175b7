"""One side of a question: the finished runs of an arm, each with the evaluation that is compared.

The sides of a suite's own question are the runs that its suite.yaml plans; `recorded` finds other sides in the ledger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp4rl.lab.runs import Run
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.words import counted


@dataclass(frozen=True)
class SideRun:
    """One run of a side, and the evaluation of it that is compared."""

    run: Run
    measured: Evaluation

    @property
    def steps(self) -> tuple[int | None, int | None]:
        """The number of steps planned, and done."""
        planned = self.run.result.steps_asked
        if planned is None:
            planned = (self.run.spec.get("training") or {}).get("steps")
        return planned, self.run.result.steps_done

    @property
    def answers(self) -> str | None:
        """The digest of the compared answers; None where none was recorded."""
        return self.run.answers(self.measured)


@dataclass(frozen=True)
class Side:
    """One side. `unmeasured`: its runs without such a number; `missing`: why it has no run at all; `planned`: how many
    runs its suite plans, where that is known."""

    name: str
    suite: str
    runs: tuple[SideRun, ...]
    score: str = "strict"
    unmeasured: tuple[str, ...] = ()
    missing: str | None = None
    planned: int | None = None

    @property
    def part(self) -> str | None:
        """How many of the planned runs are in it, in words; None for all of them, and where none are planned."""
        if self.planned is None or len(self.runs) == self.planned:
            return None
        return f"{len(self.runs)} of the {counted(self.planned, 'planned run')} of {self.name}"

    @property
    def spec(self) -> Mapping[str, Any]:
        """The experiment of which all its runs are repeats; empty for foreign logs."""
        return self.runs[0].run.described if self.runs else {}

    @property
    def points(self) -> tuple[float, ...]:
        """One accuracy per seed, in points."""
        return tuple(100 * (run.measured.score(self.score) or 0.0) for run in self.runs)


@dataclass(frozen=True)
class At:
    """Which number is compared: the evaluation at `step` (None: the last) and the score, `strict` or `flexible`."""

    step: int | None = None
    score: str = "strict"

    def of(self, run: Run, profile: str) -> Evaluation | None:
        """Return the run's evaluation under a profile; None where it does not have this score."""
        evaluation = run.evaluations(self.step).get(profile)
        return evaluation if evaluation is not None and evaluation.score(self.score) is not None else None


def planned_side(name: str, by_arm: Mapping[str, Sequence[SuiteRun]], at: At) -> Side:
    """Return the side `arm@profile` of a suite's own question, from the runs that the suite plans.

    A run that failed or is damaged is named, so that the comparison is refused; of those that are not there yet the
    side tells the number alone.
    """
    arm, _, profile = name.partition("@")
    planned = by_arm.get(arm, ())
    runs = [own.run for own in planned if own.run is not None]
    side = side_of(name, planned[0].planned.suite if planned else "", runs, profile, at)
    lost = tuple(f"{own.planned.run_id} ({why})" for own in planned if (why := _lost(own)) is not None)
    if side.runs:  # left out in silence, what fails would make its arm look better than it is
        return replace(side, unmeasured=side.unmeasured + lost, planned=len(planned))
    where = "at its last step" if at.step is None else f"at step {at.step}"
    missing = f"no run of {name} was evaluated {where}" if runs else f"no run of {arm} is finished"
    missing += f": {lost[0]}" if lost else ""
    return Side(name, side.suite, (), at.score, missing=missing, planned=len(planned))


def _lost(own: SuiteRun) -> str | None:
    if own.failure is not None:
        return f"failed: {own.failure}"
    return None if own.damage is None else f"damaged: {own.damage}"


def side_of(name: str, suite: str, runs: Sequence[Run], profile: str, at: At) -> Side:
    """Return the side of these runs, with what they measured under a profile."""
    measured = [(run, at.of(run, profile)) for run in runs]
    side_runs = tuple(SideRun(run, evaluation) for run, evaluation in measured if evaluation is not None)
    return Side(name, suite, side_runs, at.score, tuple(run.key for run, evaluation in measured if evaluation is None))
