"""One side of a question: the finished runs of an arm, each with the evaluation that is compared.

The sides of a suite's own question are the runs that its suite.yaml plans; other sides are found in the ledger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, or_, select

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.query import runs_of
from fp4rl.lab.runs import Run, read_run
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.evidence import Evaluation


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
    """One side. `unmeasured`: its runs without such a number; `missing`: why it has no run at all."""

    name: str
    suite: str
    runs: tuple[SideRun, ...]
    score: str = "strict"
    unmeasured: tuple[str, ...] = ()
    missing: str | None = None

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
    """Return the side `arm@profile` of a suite's own question, from the runs that the suite plans."""
    arm, _, profile = name.partition("@")
    planned = by_arm.get(arm, ())
    runs = [own.run for own in planned if own.run is not None]
    side = _side(name, planned[0].planned.suite if planned else "", runs, profile, at)
    failed = tuple(f"{own.planned.run_id} (failed: {own.failure})" for own in planned if own.failure)
    if side.runs:  # left out in silence, what fails would make its arm look better than it is
        return replace(side, unmeasured=side.unmeasured + failed)
    where = "at its last step" if at.step is None else f"at step {at.step}"
    missing = f"no run of {name} was evaluated {where}" if runs else f"no run of {arm} is finished"
    missing += f": {failed[0]}" if failed else ""
    return Side(name, side.suite, (), at.score, missing=missing)


def named_side(connection: Connection, root: Path, name: str, at: At, suite: str | None = None) -> Side:
    """Find a side by the user's word: `arm`, `suite/arm`, a run id or an experiment's digest, each with `@profile`.

    Runs are read from their folders below `root`, or from the ledger where the folder is not there. Raises
    `NotFoundError` for a name without runs and for an evaluation that none of them has, `InvalidValueError` for a name
    that matches runs of several suites or experiments.
    """
    word, sign, profile = name.partition("@")
    if not word or (sign and not profile):
        raise InvalidValueError(f"a side is written arm, suite/arm or run id, with @profile; got {name!r}")
    rows = _named(connection, word, suite)
    folders = {row["id"]: RunFolder(root / row["suite"] / row["run_id"]) for row in rows}
    recorded = runs_of(connection, [number for number, folder in folders.items() if not folder.finished])
    runs = [recorded.get(number) or read_run(folder, curves=False) for number, folder in folders.items()]
    return _side(name, rows[0]["suite"], runs, _profile(word, profile, runs, at), at)


def _side(name: str, suite: str, runs: Sequence[Run], profile: str, at: At) -> Side:
    measured = [(run, at.of(run, profile)) for run in runs]
    side_runs = tuple(SideRun(run, evaluation) for run, evaluation in measured if evaluation is not None)
    return Side(name, suite, side_runs, at.score, tuple(run.key for run, evaluation in measured if evaluation is None))


def _profile(word: str, profile: str, runs: Sequence[Run], at: At) -> str:
    """Return the named profile, else the only one there is, else `deployment`."""
    names = sorted({name for run in runs for name in run.evaluations(at.step)})
    if not names:
        steps = sorted({evaluation.step for run in runs for evaluation in run.result.evaluations})
        where = "at the last step" if at.step is None else f"at step {at.step}"
        listed = ", ".join(map(str, steps)) or "none"
        raise NotFoundError(f"{word} has no evaluation {where}; there are: {listed}")
    chosen = profile or (names[0] if len(names) == 1 else "deployment")
    if chosen not in names:
        raise NotFoundError(f"{word} was not evaluated as {chosen!r}" + nearest(chosen, names))
    if not any(at.of(run, chosen) for run in runs):
        raise NotFoundError(f"{word} has no {at.score} accuracy as {chosen!r}")
    return chosen


def _named(connection: Connection, word: str, suite: str | None) -> list[Any]:
    """Return the runs that a word names: as a run, else as an experiment, else as an arm."""
    table = tables.runs.c
    head, _, tail = word.rpartition("/")
    name = or_(table.run_id == tail, table.arm == tail, table.experiment == tail)
    query = select(tables.runs).where(name).order_by(table.suite, table.arm, table.seed)
    if head or suite:
        query = query.where(table.suite == (head or suite))
    rows = list(connection.execute(query).mappings()) or _beginning(connection, tail, head or suite)
    rows = [row for row in rows if row["run_id"] == tail] or rows
    if not rows:
        known = {f"{suite}/{arm}" for suite, arm in connection.execute(select(table.suite, table.arm).distinct())}
        raise NotFoundError(f"no finished run or arm is called {word!r}" + (nearest(word, known) if known else ""))
    suites = sorted({row["suite"] for row in rows})
    if len(suites) > 1:
        raise InvalidValueError(f"{word!r} is in the suites {', '.join(suites)}; write {suites[0]}/{tail}")
    digests = sorted({str(row["experiment"]) for row in rows})
    if len(digests) > 1 and not all(row["imported"] for row in rows):
        raise InvalidValueError(
            f"{word!r} names runs of {len(digests)} different experiments, which are no repeats; "
            f"name one by its digest: {', '.join(digests)}"
        )
    return rows


def _beginning(connection: Connection, start: str, suite: str | None) -> list[Any]:
    """Return the one run whose id begins with `start`. Raises InvalidValueError where several do."""
    table = tables.runs.c
    query = select(tables.runs).where(table.run_id.startswith(start, autoescape=True)).order_by(table.run_id)
    rows = list(connection.execute(query.where(table.suite == suite) if suite else query).mappings())
    if len(rows) > 1:
        some = ", ".join(f"{row['suite']}/{row['run_id']}" for row in rows[:4])
        raise InvalidValueError(f"{len(rows)} runs begin with {start!r}: {some}; name more of it")
    return rows
