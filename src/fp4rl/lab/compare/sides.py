"""One side of a comparison: the finished runs of an arm, each with its last number and what that was measured under."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, or_, select

from fp4rl.lab.compare.evidence import gaps
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.document import Document
from fp4rl.lab.ledger.query import documents_of, rows_of_runs
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest


@dataclass(frozen=True)
class Measured:
    """One evaluation of one run. `value` is a share; `conditions` is all that the number depends on besides weights."""

    step: int
    last: bool
    profile: str
    n: int | None
    value: float
    conditions: Mapping[str, Any]


@dataclass(frozen=True)
class SideRun:
    """One run of a side."""

    id: int
    key: str
    seed: int | None
    experiment: str | None
    code_digest: str | None
    steps: tuple[int | None, int | None]  # asked, done
    measured: Measured
    gaps: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None  # digest of the final weights
    answers: str | None = None  # digest of the answers that were measured
    hardly_moved: str | None = None  # in words, where training changed few weights


@dataclass(frozen=True)
class Side:
    """What stands on one side. `spec` is the experiment that all its runs repeat, empty for foreign logs."""

    name: str
    suite: str
    runs: tuple[SideRun, ...]
    spec: Mapping[str, Any]
    unmeasured: tuple[str, ...] = ()  # runs of this side that have no such number

    @property
    def points(self) -> tuple[float, ...]:
        """One accuracy per seed, in points."""
        return tuple(100 * run.measured.value for run in self.runs)


@dataclass(frozen=True)
class Asked:
    """A side as a user writes it: `arm`, `suite/arm`, a run id or an experiment's digest, each with `@profile`."""

    word: str
    profile: str | None

    @classmethod
    def of(cls, text: str) -> "Asked":
        word, at, profile = text.partition("@")
        if not word or (at and not profile):
            raise InvalidValueError(f"a side is written arm, suite/arm or run id, with @profile; got {text!r}")
        return cls(word, profile or None)


def read_side(
    connection: Connection, text: str, *, step: int | None = None, score: str = "strict", suite: str | None = None
) -> Side:
    """Find the runs and their numbers at `step` (the last one by default).

    Raises `NotFoundError` for a name without runs and for an evaluation that none of them has, `InvalidValueError` for
    a name that means runs of several suites or experiments.
    """
    asked = Asked.of(text)
    found = _named(connection, asked.word, suite)
    chosen = _evaluations(connection, [row["id"] for row in found], asked, step, score)
    documents = documents_of(connection, [row["id"] for row in found])
    spec = {key: value for key, value in documents[found[0]["id"]].spec.items() if key != "seed"}
    judged = _judged(connection, list(documents))
    runs = tuple(
        _side_run(row, chosen[row["id"]], documents[row["id"]], judged[row["id"]])
        for row in found
        if row["id"] in chosen
    )
    unmeasured = tuple(f"{row['suite']}/{row['run_id']}" for row in found if row["id"] not in chosen)
    return Side(text, found[0]["suite"], runs, spec, unmeasured)


def _judged(connection: Connection, ids: list[int]) -> dict[int, list[Mapping[str, Any]]]:
    """Run -> its evaluations."""
    found: dict[int, list[Mapping[str, Any]]] = {number: [] for number in ids}
    for row in rows_of_runs(connection, tables.evaluations, ids):
        found[row["run"]].append(row)
    return found


def _side_run(row: Any, measured: Measured, document: Document, judged: list[Mapping[str, Any]]) -> SideRun:
    foreign = ("it is a foreign log without evidence",)
    summary = document.result.get("evidence") or {}
    missing = gaps(document.spec, summary, document.evidence, judged) if not row["imported"] else foreign
    return SideRun(
        row["id"],
        f"{row['suite']}/{row['run_id']}",
        row["seed"],
        row["experiment"],
        row["code_digest"],
        (row["steps_asked"], row["steps_done"]),
        measured,
        missing,
        document.result.get("versions") or {},
        inputs_of(summary),
        summary.get("final_weights"),
        answers_of(document.evidence, measured.step, measured.profile),
        summary.get("hardly_moved"),
    )


def answers_of(lines: Sequence[Mapping[str, Any]], step: int, profile: str) -> str | None:
    """The digest of the answers that an evaluation recorded; the last record of it counts, as in the result."""
    found = [line for line in lines if line.get("kind") == "evaluation" and line.get("step") == step]
    own = [line.get("answers_digest") for line in found if (line.get("profile") or {}).get("name") == profile]
    return own[-1] if own else None


def inputs_of(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """What a result says it was made from: digests by name, and the number of processes that trained it."""
    number = {"number of processes": evidence["processes"]} if "processes" in evidence else {}
    return {**(evidence.get("inputs") or {}), **number}


def _named(connection: Connection, word: str, suite: str | None) -> list[Any]:
    """The runs a word means: a run first, then an experiment, then an arm."""
    table = tables.runs.c
    head, _, tail = word.rpartition("/")
    name = or_(table.run_id == tail, table.arm == tail, table.experiment == tail)
    query = select(tables.runs).where(name).order_by(table.suite, table.arm, table.seed)
    if head or suite:
        query = query.where(table.suite == (head or suite))
    found = list(connection.execute(query).mappings()) or _beginning(connection, tail, head or suite)
    found = [row for row in found if row["run_id"] == tail] or found
    if not found:
        known = {f"{suite}/{arm}" for suite, arm in connection.execute(select(table.suite, table.arm).distinct())}
        raise NotFoundError(f"no finished run or arm is called {word!r}" + (nearest(word, known) if known else ""))
    suites = sorted({row["suite"] for row in found})
    if len(suites) > 1:
        raise InvalidValueError(f"{word!r} is in the suites {', '.join(suites)}; write {suites[0]}/{tail}")
    digests = sorted({str(row["experiment"]) for row in found})
    if len(digests) > 1 and not all(row["imported"] for row in found):
        raise InvalidValueError(
            f"{word!r} names runs of {len(digests)} different experiments, which are no repeats; "
            f"name one by its digest: {', '.join(digests)}"
        )
    return found


def _beginning(connection: Connection, start: str, suite: str | None) -> list[Any]:
    """The one run whose id begins so. Raises InvalidValueError where several do."""
    table = tables.runs.c
    query = select(tables.runs).where(table.run_id.startswith(start, autoescape=True)).order_by(table.run_id)
    found = list(connection.execute(query.where(table.suite == suite) if suite else query).mappings())
    if len(found) > 1:
        some = ", ".join(f"{row['suite']}/{row['run_id']}" for row in found[:4])
        raise InvalidValueError(f"{len(found)} runs begin with {start!r}: {some}; name more of it")
    return found


def _evaluations(
    connection: Connection, ids: list[int], asked: Asked, step: int | None, score: str
) -> dict[int, Measured]:
    """Run -> its number. The profile, where none is named, is the only one, or `deployment` where there are more."""
    rows = rows_of_runs(connection, tables.evaluations, ids)
    at = [row for row in rows if (row["last"] if step is None else row["step"] == step)]
    profiles = sorted({row["profile"] for row in at})
    if not at:
        steps = ", ".join(str(number) for number in sorted({row["step"] for row in rows})) or "none"
        where = "at the last step" if step is None else f"at step {step}"
        raise NotFoundError(f"{asked.word} has no evaluation {where}; there are: {steps}")
    profile = asked.profile or (profiles[0] if len(profiles) == 1 else "deployment")
    if profile not in profiles:
        raise NotFoundError(f"{asked.word} was not evaluated as {profile!r}" + nearest(profile, profiles))
    found = {
        row["run"]: Measured(row["step"], row["last"], profile, row["n"], row[score], row["conditions"])
        for row in at
        if row["profile"] == profile and row[score] is not None
    }
    if not found:
        raise NotFoundError(f"{asked.word} has no {score} accuracy as {profile!r}")
    return found
