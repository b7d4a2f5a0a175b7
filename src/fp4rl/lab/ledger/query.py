"""Queries of the ledger: which runs there are, everything about one, and which are repeats of each other."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Select, func, select

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.store import open_ledger
from fp4rl.lab.ledger.tables import Row, evaluation_row, run_of
from fp4rl.lab.runs import Run, read_run
from fp4rl.lab.spent import Spending, TotalSpent
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

if TYPE_CHECKING:
    from fp4rl.lab.statistics.seeds import Spread

runs, evaluations, documents = tables.runs, tables.evaluations, tables.documents
_IN_A_STATEMENT = 500  # ids in the parameters of one statement


@dataclass(frozen=True)
class Filter:
    """A filter of runs; None takes all."""

    suite: str | None = None
    arm: str | None = None
    seed: int | None = None
    profile: str | None = None

    def applied(self, query: Select[Any]) -> Select[Any]:
        """Return the query with these conditions added."""
        for name in ("suite", "arm", "seed"):
            wanted = getattr(self, name)
            query = query.where(runs.c[name] == wanted) if wanted is not None else query
        if self.profile is None:
            return query
        evaluated = select(evaluations.c.run).where(evaluations.c.last, evaluations.c.profile == self.profile)
        return query.where(runs.c.id.in_(evaluated))


def list_runs(connection: Connection, wanted: Filter, limit: int | None = None) -> list[Row]:
    """Return a row for each run, in order of suite, arm and seed, with its last accuracies and KLs: profile -> share,
    and profile -> nats a token where they were measured."""
    names = ("id", "suite", "run_id", "arm", "seed", "steps_asked", "steps_done", "code_digest", "imported", "status")
    query = wanted.applied(select(*(runs.c[name] for name in names)))
    query = query.order_by(runs.c.suite, runs.c.arm, runs.c.seed, runs.c.run_id).limit(limit)
    of_these = evaluations.c.run.in_(query.with_only_columns(runs.c.id))
    last = select(evaluations).where(evaluations.c.last, of_these).order_by(evaluations.c.profile)
    scores: dict[int, dict[str, float]] = defaultdict(dict)
    kls: dict[int, dict[str, float]] = defaultdict(dict)
    for row in connection.execute(last):
        scores[row.run][row.profile] = row.strict
        if row.kl is not None:
            kls[row.run][row.profile] = row.kl
    return [{**row, "strict": scores[row["id"]], "kl": kls[row["id"]]} for row in connection.execute(query).mappings()]


def count_runs(connection: Connection, wanted: Filter) -> int:
    """Return the number of runs that the filter takes."""
    return int(connection.execute(wanted.applied(select(func.count()).select_from(runs))).scalar_one())


def profiles_of(connection: Connection) -> list[str]:
    """Return every profile that a run was evaluated under at its end."""
    query = select(evaluations.c.profile).where(evaluations.c.last).distinct().order_by(evaluations.c.profile)
    return list(connection.execute(query).scalars())


def find_run(connection: Connection, word: str) -> Row:
    """Return the index row of one run, by `suite/run-id`, run id, or the beginning of either.

    Raises `NotFoundError` with the nearest name, `InvalidValueError` where several runs begin so.
    """
    rows = connection.execute(select(runs.c.id, runs.c.suite, runs.c.run_id))
    names = {f"{suite}/{run_id}": number for number, suite, run_id in rows}
    exact = [key for key in names if word in (key, key.partition("/")[2])]
    matching = exact or [key for key in names if key.startswith(word) or key.partition("/")[2].startswith(word)]
    if not names:
        raise NotFoundError(
            "the ledger holds no run; `fp4rl run` makes some, `fp4rl runs import FILE` takes over a log"
        )
    if not matching:
        close = nearest(word, [*names, *(key.partition("/")[2] for key in names)])
        hint = close if close.startswith("; did") else f"; `fp4rl runs` lists all {len(names)}"
        raise NotFoundError(f"no run is called {word!r}{hint}")
    if len(matching) > 1:
        raise InvalidValueError(
            f"{len(matching)} runs begin with {word!r}: {', '.join(sorted(matching)[:4])}; name more of it"
        )
    return dict(connection.execute(select(runs).where(runs.c.id == names[matching[0]])).mappings().one())


def runs_of(connection: Connection, ids: Sequence[int]) -> dict[int, Run]:
    """Return the runs as they were recorded, by number, without their metrics."""
    read: dict[int, Run] = {}
    for start in range(0, len(ids), _IN_A_STATEMENT):
        some = documents.c.run.in_(ids[start : start + _IN_A_STATEMENT])
        for number, record in connection.execute(select(documents.c.run, documents.c.record).where(some)):
            read[number] = run_of(record, {})
    return read


def runs_on(connection: Connection, kinds: Iterable[tuple[str, str]]) -> list[Run]:
    """Return the runs of each task and model, given by their digests, without their metrics."""
    of_kinds = (select(runs.c.id).where(runs.c.task == task, runs.c.model == model) for task, model in kinds)
    ids = [number for query in of_kinds for number in connection.execute(query).scalars()]
    return list(runs_of(connection, ids).values())


def repeats(connection: Connection, task: str, model: str) -> list[list[float]]:
    """Return the last strict accuracies (shares) of runs of the same task and model, a list for each experiment.

    Within a list the runs differ only in the seed, and a seed counts once, in whichever suites it was run. Of several
    profiles `deployment` is taken, else the first, since other profiles of the same runs are not further repeats. Runs
    that were rounded differently under one profile are not repeats of each other.
    """
    query = (
        select(runs.c.experiment, evaluations.c.profile, evaluations.c.conditions, runs.c.seed, evaluations.c.strict)
        .select_from(runs.join(evaluations, evaluations.c.run == runs.c.id))
        .where(evaluations.c.last, runs.c.task == task, runs.c.model == model)
        .where(evaluations.c.strict.is_not(None))
        .order_by(runs.c.experiment, evaluations.c.profile, runs.c.seed, runs.c.suite)
    )
    values: dict[str, dict[str, dict[str | None, dict[int, float]]]] = {}
    for experiment, profile, conditions, seed, value in connection.execute(query):
        alike = values.setdefault(experiment, {}).setdefault(profile, {})
        alike.setdefault(conditions.get("sites_digest"), {}).setdefault(seed, value)
    chosen = (profiles.get("deployment") or next(iter(profiles.values())) for profiles in values.values())
    return [list(by_seed.values()) for alike in chosen for by_seed in alike.values()]


def known_spread(address: str | Path, task: str, model: str) -> "Spread | None":
    """Return `spread_on` from the ledger at `address`; None where there is no ledger."""
    if isinstance(address, Path) and not address.is_file():
        return None
    with open_ledger(address) as ledger, ledger.reading() as connection:
        return spread_on(connection, task, model)


def spread_of_run(connection: Connection, run: Run) -> "Spread | None":
    """Return the spread of repeats of a run's task and model, in points; None without repeats."""
    return spread_on(connection, digest(run.spec.get("task")), digest(run.spec.get("model")))


def spread_on(connection: Connection, task: str, model: str) -> "Spread | None":
    """Return the spread of repeats of a task and model, given by their digests, in points; None without repeats."""
    from fp4rl.lab.statistics.seeds import pooled  # imports scipy, which listing runs does not need

    groups = repeats(connection, task, model)
    return pooled([100 * share for share in group] for group in groups)


def known_spreads(connection: Connection, like: str | None = None) -> "list[tuple[str, Spread]]":
    """Return (task on model, spread in points) for all with repeats; with `like` for that run's task and model only."""
    kinds = select(func.min(runs.c.id)).where(runs.c.experiment.is_not(None))
    if like is not None:
        kinds = kinds.where(runs.c.experiment == find_run(connection, like)["experiment"])
    spreads = []
    kinds = kinds.group_by(runs.c.task, runs.c.model).order_by(runs.c.task, runs.c.model)
    for number in connection.execute(kinds).scalars():
        run = runs_of(connection, [number])[number]
        spread = spread_of_run(connection, run)
        if spread is not None and spread.sd > 0:
            spreads.append((f"{_name(run.spec.get('task'))} on {_name(run.spec.get('model'))}", spread))
    return spreads


def _name(described: Any) -> str:
    """Return the name of a part of a spec: its name, the last part of its path, or its first key."""
    if not isinstance(described, dict):
        return str(described)
    if described.get("name"):
        return str(described["name"])
    if described.get("path"):
        return str(described["path"]).rstrip("/").rpartition("/")[2]
    return next((key for key, value in described.items() if value is not None), "?")


@dataclass(frozen=True)
class About:
    """A run, its row in the ledger's index, the number of answers of each evaluation, and its files."""

    run: Run
    index: Row
    items: Sequence[Row]
    files: Sequence[Row]

    @property
    def curves(self) -> dict[str, Row]:
        """Name -> first, last, lowest, highest; None where a value was not a number."""
        return curves_of(self.run.curves.values())

    @cached_property
    def spent(self) -> TotalSpent:
        """What its training, its stages and its teacher took."""
        return Spending().of(self.run)

    @property
    def lines(self) -> dict[str, int]:
        """Kind of evidence -> how many lines there are."""
        return dict(Counter(line.kind for line in self.run.lines))

    def as_dict(self) -> Row:
        """Return everything as plain values for JSON."""
        run, result = self.run, self.run.result
        return {
            "run": self.run_row(),
            "spec": run.described,
            "evaluations": [evaluation_row(evaluation) for evaluation in result.evaluations],
            "gaps": run.gaps,
            "warnings": run.warnings,
            "evidence_lines": self.lines,
            "spent": asdict(self.spent),
            "metrics": self.curves,
            "items": self.items,
            "artefacts": self.files,
        }

    def run_row(self) -> Row:
        """Return the run itself as plain values."""
        result = self.run.result
        named = ("id", "suite", "run_id", "arm", "seed", "experiment", "code_digest", "steps_asked", "steps_done")
        return {name: self.index[name] for name in (*named, "content")} | {
            "spec_digest": result.spec_digest,
            "sites_digest": self.run.sites.digest,
            "wall_s": result.wall_s,
            "versions": result.versions,
            "evidence": result.evidence.as_json(),
            "imported": None if result.imported is None else result.imported.as_json(),
        }


def about(connection: Connection, root: Path, word: str) -> About:
    """Return the run that `word` names, from its folder below `root` or else the ledger. Raises as `find_run` does."""
    index = find_run(connection, word)
    folder = RunFolder(root / index["suite"] / index["run_id"])
    record, metrics = connection.execute(
        select(documents.c.record, documents.c.metrics).where(documents.c.run == index["id"])
    ).one()
    run = read_run(folder) if folder.finished else run_of(record, metrics)
    return About(run, index, record["items"], record["files"])


def answers(folder: RunFolder, problem: str) -> list[Row]:
    """Return every answer of a run to one problem. Raises `NotFoundError` with the first ids of its problems."""
    rows: list[Row] = []
    known: set[str] = set()
    for step, profile in folder.item_sets():
        for row in folder.items(step, profile).to_pylist():
            known.add(row["problem_id"])
            if row["problem_id"] == problem:
                own = {name: row[name] for name in ("sample", "strict", "length", "completion")}
                rows.append({"step": step, "profile": profile} | own)
    if not rows:
        ids = f"; its {len(known)} problems are {', '.join(sorted(known)[:3])}, ..." if known else ""
        where = ids if folder.path.is_dir() else f": its folder {folder.path} is not here"
        raise NotFoundError(f"{folder.run_id} has no answer to {problem!r}{where}")
    return rows


def curves_of(steps: Iterable[Mapping[str, float]]) -> dict[str, Row]:
    """Return name -> first, last, lowest, highest; None for a value that was not a number."""
    values: dict[str, list[float | None]] = defaultdict(list)
    for step in steps:
        for name, value in step.items():
            values[name].append(None if math.isnan(value) else value)
    return {name: _curve(numbers) for name, numbers in sorted(values.items())}


def _curve(numbers: list[float | None]) -> Row:
    known = [number for number in numbers if number is not None]
    ends = {"lowest": min(known, default=None), "highest": max(known, default=None)}
    return {"count": len(numbers), "first": numbers[0], "last": numbers[-1], **ends}
