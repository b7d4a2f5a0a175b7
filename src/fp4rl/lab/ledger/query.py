"""Questions to the ledger: which runs there are, everything about one, and which of them repeat each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, func, select

from fp4rl.lab.ledger import tables
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

Row = dict[str, Any]
runs, experiments, evaluations = tables.runs, tables.experiments, tables.evaluations


@dataclass(frozen=True)
class Filter:
    """Which runs; None takes all."""

    suite: str | None = None
    arm: str | None = None
    seed: int | None = None
    profile: str | None = None

    def applied(self, query: Select[Any]) -> Select[Any]:
        for name in ("suite", "arm", "seed"):
            wanted = getattr(self, name)
            query = query.where(runs.c[name] == wanted) if wanted is not None else query
        if self.profile is None:
            return query
        judged = select(evaluations.c.run).where(evaluations.c.last, evaluations.c.profile == self.profile)
        return query.where(runs.c.id.in_(judged))


def list_runs(connection: Connection, wanted: Filter, limit: int | None = None) -> list[Row]:
    """One row per run, in order of suite, arm and seed, with its last accuracies: profile -> share."""
    shown = (runs.c.id, runs.c.suite, runs.c.run_id, runs.c.arm, runs.c.seed, runs.c.steps_asked, runs.c.steps_done)
    foreign = (runs.c.imported.is_not(None).label("imported"), runs.c.imported["status"].as_string().label("status"))
    query = wanted.applied(select(*shown, runs.c.code_digest, *foreign))
    query = query.order_by(runs.c.suite, runs.c.arm, runs.c.seed, runs.c.run_id).limit(limit)
    found = [dict(row) for row in connection.execute(query).mappings()]
    scores = _last_scores(connection, [row["id"] for row in found])
    return [row | {"strict": scores.get(row["id"], {})} for row in found]


def _last_scores(connection: Connection, ids: Sequence[int]) -> dict[int, dict[str, float]]:
    scores: dict[int, dict[str, float]] = {}
    columns = (evaluations.c.run, evaluations.c.profile, evaluations.c.strict)
    for some in chunks(ids):
        query = select(*columns).where(evaluations.c.last, evaluations.c.run.in_(some)).order_by(evaluations.c.profile)
        for run, profile, strict in connection.execute(query):
            scores.setdefault(run, {})[profile] = strict
    return scores


def count_runs(connection: Connection, wanted: Filter) -> int:
    """How many runs the filter takes."""
    return int(connection.execute(wanted.applied(select(func.count()).select_from(runs))).scalar_one())


def profiles_of(connection: Connection) -> list[str]:
    """Every profile that a run was judged under at its end."""
    query = select(evaluations.c.profile).where(evaluations.c.last).distinct().order_by(evaluations.c.profile)
    return list(connection.execute(query).scalars())


def find_run(connection: Connection, word: str) -> Row:
    """One run by `suite/run-id`, run id, or the beginning of either.

    Raises `NotFoundError` with the nearest name, `InvalidValueError` where several runs begin so.
    """
    names = {f"{suite}/{run_id}": number for number, suite, run_id in _names(connection)}
    exact = [key for key in names if word in (key, key.partition("/")[2])]
    found = exact or [key for key in names if key.startswith(word) or key.partition("/")[2].startswith(word)]
    if not names:
        raise NotFoundError(
            "the ledger holds no run; `fp4rl run` makes some, `fp4rl runs import FILE` takes over a log"
        )
    if not found:
        close = nearest(word, [*names, *(key.partition("/")[2] for key in names)])
        hint = close if close.startswith("; did") else f"; `fp4rl runs` lists all {len(names)}"
        raise NotFoundError(f"no run is called {word!r}{hint}")
    if len(found) > 1:
        raise InvalidValueError(
            f"{len(found)} runs begin with {word!r}: {', '.join(sorted(found)[:4])}; name more of it"
        )
    return dict(connection.execute(select(runs).where(runs.c.id == names[found[0]])).mappings().one())


def _names(connection: Connection) -> list[Any]:
    return list(connection.execute(select(runs.c.id, runs.c.suite, runs.c.run_id)))


def rows_of_runs(connection: Connection, table: Any, ids: Sequence[int]) -> list[Row]:
    """All rows of `table` that belong to the runs `ids`, in the order of the table's key."""
    found: list[Row] = []
    for some in chunks(ids):
        query = select(table).where(table.c.run.in_(some)).order_by(*table.primary_key.columns)
        found += [dict(row) for row in connection.execute(query).mappings()]
    return found


def specs(connection: Connection, digests: Iterable[str]) -> dict[str, Row]:
    """Experiment digest -> what was described."""
    query = select(experiments.c.digest, experiments.c.spec).where(experiments.c.digest.in_(sorted(set(digests))))
    return {row.digest: row.spec for row in connection.execute(query)}


def repeats(connection: Connection, task: str, model: str) -> list[list[float]]:
    """Last strict accuracies (shares) of runs of the same task and model, one list per experiment.

    Within a list the runs differ in nothing but the seed, and a seed counts once, in whichever suites it was run. Of
    several profiles `deployment` is taken, or else the first: other views of the same runs are no further repeats.
    """
    query = (
        select(runs.c.experiment, evaluations.c.profile, runs.c.seed, evaluations.c.strict)
        .select_from(runs.join(evaluations, evaluations.c.run == runs.c.id).join(experiments))
        .where(evaluations.c.last, experiments.c.task == task, experiments.c.model == model)
        .where(evaluations.c.strict.is_not(None))
        .order_by(runs.c.experiment, evaluations.c.profile, runs.c.seed, runs.c.suite)
    )
    found: dict[str, dict[str, dict[int, float]]] = {}
    for experiment, profile, seed, value in connection.execute(query):
        found.setdefault(experiment, {}).setdefault(profile, {}).setdefault(seed, value)
    chosen = (profiles.get("deployment") or next(iter(profiles.values())) for profiles in found.values())
    return [list(values.values()) for values in chosen]


def chunks(ids: Sequence[int], size: int = 500) -> Iterable[Sequence[int]]:
    """Pieces short enough for one statement's parameters."""
    return (ids[start : start + size] for start in range(0, len(ids), size))
