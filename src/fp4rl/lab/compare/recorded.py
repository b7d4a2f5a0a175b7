"""Sides and questions of a comparison out of the ledger: what it imports, a report of a suite's folder does without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, or_, select

from fp4rl.lab.compare.comparison import Question
from fp4rl.lab.compare.declared import declared_questions, suite_questions, with_sides
from fp4rl.lab.compare.sides import At, Side, side_of
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.query import runs_of
from fp4rl.lab.runs import Run, read_run
from fp4rl.lab.suites import read_suite
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.load import read_yaml


def questions_in(connection: Connection, root: Path, suite: str, at: At) -> list[tuple[Question, Side, Side]]:
    """Return every question of the suite in `root` with both sides, from the runs in its folder, or from the ledger
    where no run folder is there or its file plans none.

    Raises `NotFoundError` for a suite without its file.
    """
    questions = declared_questions(root, suite)
    if "arms" in read_yaml(root / suite / "suite.yaml"):
        plan = read_suite(root / suite, curves=False)
        if any(run.state != "missing" for run in plan.runs):
            return suite_questions(plan, at)

    def named(name: str) -> Side:
        try:
            return named_side(connection, root, name, at, suite)
        except NotFoundError as error:
            return Side(name, suite, (), at.score, missing=str(error))

    return with_sides(questions, named, at)


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
    return side_of(name, rows[0]["suite"], runs, _profile(word, profile, runs, at), at)


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
