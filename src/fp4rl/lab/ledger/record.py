"""A finished run's folder becomes rows: all of them or none, and the same rows however often it is recorded."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError, StatementError

from fp4rl.lab.damage import Damaged, OnDamaged, damage_named, tell
from fp4rl.lab.folders import RunFolder, finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.packing import pack
from fp4rl.lab.ledger.store import Ledger
from fp4rl.spec.digest import digest

Row = dict[str, Any]
OnRun = Callable[[int, int], None]

# Written while or after the result is, so their content is not settled by it.
_UNSETTLED = ("log.txt", "tensorboard", "wandb")
_HASHED_UP_TO = 64 * 2**20


@dataclass
class Rows:
    """Everything that the ledger holds of one run, by table."""

    run: Row
    experiment: Row | None
    problem_lists: list[Row] = field(default_factory=list)
    of_run: dict[Table, list[Row]] = field(default_factory=dict)


def record(ledger: Ledger, folder: RunFolder) -> bool:
    """Put a finished run into the ledger; False where exactly this result is there already.

    Raises `NotFoundError` for a run that is not finished. Safe to call from several processes at once.
    """
    content = content_of(folder)
    with ledger.reading() as connection:
        if known_content(connection).get((folder.suite, folder.run_id)) == content:
            return False
    rows = rows_of(folder)
    with ledger.writing() as connection:
        write_rows(connection, rows, folder)
    return True


def record_new(ledger: Ledger, root: Path, on_run: OnRun | None = None, on_damaged: OnDamaged | None = None) -> int:
    """Record every finished run below `root` that the ledger does not hold as it is; how many those were.

    `on_run(done, total)` is called after each, `on_damaged` for a run that cannot be read and is left out; without it
    the first of these is raised once all others are recorded.
    """
    with ledger.reading() as connection:
        known = known_content(connection)
    finished, damaged, recorded = finished_runs(root), list[Damaged](), 0
    for done, run in enumerate(finished, start=1):
        try:
            if known.get((run.suite, run.run_id)) != content_of(run):
                recorded += record(ledger, run)
        except Damaged as error:
            damaged.append(error)
        if on_run:
            on_run(done, len(finished))
    tell(damaged, on_damaged)
    return recorded


def known_content(connection: Connection) -> dict[tuple[str, str], str]:
    """(suite, run id) -> digest of the result that the ledger holds."""
    table = tables.runs.c
    found = connection.execute(select(table.suite, table.run_id, table.content))
    return {(suite, run_id): content for suite, run_id, content in found}


def content_of(folder: RunFolder) -> str:
    """SHA-256 of `result.json`, which is written last and never again; empty where there is none."""
    file = folder.path / "result.json"
    with damage_named(file):
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def rows_of(folder: RunFolder) -> Rows:
    """Read a run's folder into rows. Raises `NotFoundError` for a run that is not finished, `Damaged` for one that
    cannot be read."""
    if not folder.finished:
        folder.result()
    with damage_named(folder.path):
        return _rows(folder)


def _rows(folder: RunFolder) -> Rows:
    result, spec = folder.result(), folder.spec()
    if spec and result.get("spec_digest") not in (None, digest(spec)):  # YAML that lost its end can still be YAML
        raise ValueError("spec.yaml is not what its result was computed from")
    number = tables.run_number(folder.suite, folder.run_id)
    experiment = _experiment(spec) if spec else None
    run = {
        name: result.get(name) for name in ("seed", "spec_digest", "code_digest", "steps_asked", "steps_done", "wall_s")
    }
    run |= {
        "id": number,
        "suite": folder.suite,
        "run_id": folder.run_id,
        "arm": result.get("arm") or folder.run_id,
        "experiment": experiment["digest"] if experiment else None,
        "sites_digest": folder.sites().get("digest"),
        "versions": result.get("versions") or {},
        "evidence": result.get("evidence") or {},
        "imported": result.get("imported"),
        "content": content_of(folder),
    }
    rows = Rows(run, experiment)
    rows.of_run[tables.metrics] = _metrics(folder, number)
    rows.of_run[tables.evaluations] = _evaluations(result.get("evaluations", ()), number)
    rows.of_run[tables.evidence] = [_evidence(line, one, number) for line, one in enumerate(folder.evidence())]
    rows.of_run[tables.artefacts] = _artefacts(folder, number)
    rows.of_run[tables.items] = []
    for step, profile in folder.item_sets():
        packed = pack(folder.items(step, profile))
        rows.problem_lists.append(packed.problems)
        rows.of_run[tables.items].append({"run": number, "step": step, "profile": profile} | packed.row)
    return rows


def _experiment(spec: Row) -> Row:
    described = {key: value for key, value in spec.items() if key != "seed"}
    parts = {name: digest(described.get(name)) for name in ("task", "model")}
    return {"digest": digest(described), "spec": described, **parts}


def _metrics(folder: RunFolder, number: int) -> list[Row]:
    return [
        {"run": number, "step": step, "name": name, "value": None if math.isnan(value) else value}
        for step, values in folder.metrics().items()
        for name, value in values.items()
    ]


def _evaluations(found: Iterable[Row], number: int) -> list[Row]:
    """One a step and profile; a step that was judged twice counts as it was judged last."""
    rows = [_evaluation(one, number) for one in found]
    return list({(row["step"], row["profile"]): row for row in sorted(rows, key=lambda row: row["last"])}.values())


def _evaluation(found: Row, number: int) -> Row:
    profile = found.get("profile") or {}
    scores = {name: found.get(name) for name in ("n", "strict", "flexible", "formatted", "mean_length")}
    place = {"run": number, "step": found["step"], "profile": profile.get("name") or "full"}
    return place | {"last": bool(found.get("last")), "conditions": profile} | scores


def _evidence(line: int, found: Row, number: int) -> Row:
    named = {name: found.get(name) for name in ("kind", "phase", "step")}
    return {"run": number, "line": line, "content": found} | named


def _artefacts(folder: RunFolder, number: int) -> list[Row]:
    found = []
    for file in sorted(path for path in folder.path.rglob("*") if path.is_file()):
        path = file.relative_to(folder.path)
        if path.parts[0] in _UNSETTLED or file.name.startswith(".") or file.name.endswith(".partial"):
            continue
        size = file.stat().st_size
        checksum = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _HASHED_UP_TO else None
        found.append({"run": number, "path": path.as_posix(), "bytes": size, "sha256": checksum})
    return found


def write_rows(connection: Connection, rows: Rows, folder: RunFolder) -> None:
    """Replace the run, or raise `Damaged` and leave the ledger as it was where a value does not fit its column."""
    try:
        with connection.begin_nested():
            _write(connection, rows)
    except (StatementError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, OperationalError):
            raise
        why = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise Damaged(f"{folder.path} is damaged ({why}); put back a copy, or move it away") from error


def _write(connection: Connection, rows: Rows) -> None:
    """The run's own row comes first: whoever holds it keeps others that record the same run waiting."""
    if rows.experiment:
        _unless_there(connection, tables.experiments, [rows.experiment])
    _unless_there(connection, tables.problem_lists, rows.problem_lists)
    _put_run(connection, rows.run)
    for table, new in rows.of_run.items():
        connection.execute(delete(table).where(table.c.run == rows.run["id"]))
        if new:
            connection.execute(insert(table), new)


def _put_run(connection: Connection, run: Row) -> None:
    put = _dialect_insert(connection)(tables.runs).values(run)
    connection.execute(put.on_conflict_do_update(index_elements=["id"], set_=run))


def _unless_there(connection: Connection, table: Table, new: list[Row]) -> None:
    if new:  # in one order everywhere, so that two writers never wait for each other
        ordered = sorted({row["digest"]: row for row in new}.values(), key=lambda row: str(row["digest"]))
        connection.execute(_dialect_insert(connection)(table).on_conflict_do_nothing(), ordered)


def _dialect_insert(connection: Connection) -> Any:
    return postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
