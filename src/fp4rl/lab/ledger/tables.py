"""The tables of the ledger, an index of runs and the whole record of each, and their rows for a run.

Every key is derived from the content, so that a rebuilt ledger has the same rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from fp4rl.lab.files import damage_named, json_ready
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.runs import Run, read_run
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.former_names import with_present_names
from fp4rl.spec.records import Sites, read_evidence, read_result
from fp4rl.spec.task import SCORES

Row = dict[str, Any]

# These change while or after the result is written, so their checksums are not recorded.
_UNSETTLED = ("log.txt", "tensorboard", "wandb")
_HASHED_UP_TO = 64 * 2**20  # bytes

SCHEMA = "-".join(("0004", *SCORES[3:]))  # each further score adds a column

metadata = sa.MetaData()

schema = sa.Table("ledger_schema", metadata, sa.Column("version", sa.Text, primary_key=True))

# `experiment` is the digest of the spec without its seed: runs of one experiment are repeats of each other.
runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("suite", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("seed", sa.Integer),
    sa.Column("experiment", sa.String(12), index=True),
    sa.Column("task", sa.String(12)),
    sa.Column("model", sa.String(12)),
    sa.Column("code_digest", sa.Text),
    sa.Column("steps_asked", sa.Integer),
    sa.Column("steps_done", sa.Integer),
    sa.Column("imported", sa.Boolean, nullable=False),
    sa.Column("status", sa.Text),
    sa.Column("content", sa.String(64), nullable=False),
    sa.UniqueConstraint("suite", "run_id", name="uq_runs_suite_run_id"),
    sa.Index("ix_runs_suite_arm", "suite", "arm"),
)


def _run_column() -> sa.Column[int]:
    return sa.Column("run", sa.BigInteger, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)


evaluations = sa.Table(
    "evaluations",
    metadata,
    _run_column(),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("profile", sa.Text, primary_key=True),
    sa.Column("last", sa.Boolean, nullable=False),
    sa.Column("n", sa.Integer),
    *(sa.Column(name, sa.Double) for name in (*SCORES, "mean_length", "kl")),
    sa.Column("conditions", sa.JSON, nullable=False),
)

# `metrics` is a column of its own: it is the longest part, and only `show` reads it.
documents = sa.Table(
    "documents",
    metadata,
    _run_column(),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
)


def run_number(suite: str, run_id: str) -> int:
    """Return 63 bits of SHA-256 over the run's name: the same in every ledger, in any order of recording."""
    return int.from_bytes(hashlib.sha256(f"{suite}/{run_id}".encode()).digest()[:8]) >> 1


def record_of(run: Run, content: str, items: Sequence[Row], files: Sequence[Row]) -> Row:
    """Return the record of a run for the ledger, without its metrics. `content`: the SHA-256 of its `result.json`.

    `items`: numbers of answers and of solved problems of each evaluation. `files`: path, bytes and SHA-256 of each.
    """
    return {
        "suite": run.suite,
        "run_id": run.run_id,
        "content": content,
        "spec": run.spec,
        "sites_digest": run.sites.digest,
        "result": json_ready(run.result.as_json()),
        "evidence": [json_ready({"kind": line.kind} | line.as_json()) for line in run.lines],
        "items": items,
        "files": files,
    }


def run_of(record: Row, metrics: Mapping[Any, Mapping[str, Any]]) -> Run:
    """Return the run of a record, with its metrics (step -> name -> value, "nan" for NaN)."""
    lines = map(read_evidence, record["evidence"])
    return Run(
        suite=record["suite"],
        run_id=record["run_id"],
        spec=with_present_names(record["spec"]),
        result=read_result(record["result"]),
        lines=tuple(line for line in lines if line is not None),
        sites=Sites(digest=record["sites_digest"]),
        curves={int(step): {name: float(value) for name, value in row.items()} for step, row in metrics.items()},
    )


def read_folder(folder: RunFolder) -> tuple[Run, Row]:
    """Read a finished run and its record. Raises `NotFoundError` where it is not finished, `Damaged` for a bad file."""
    run = read_run(folder)
    with damage_named(folder.path):
        items = [_counted(folder, step, profile) for step, profile in folder.item_sets()]
        return run, record_of(run, content_of(folder), items, _files(folder))


def content_of(folder: RunFolder) -> str:
    """Return the SHA-256 of `result.json`, which is written last and only once; empty without it."""
    file = folder.path / "result.json"
    with damage_named(file):
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _counted(folder: RunFolder, step: int, profile: str) -> Row:
    strict = folder.items(step, profile).column("strict").to_pylist()  # reads the whole file, so that damage shows now
    return {"step": step, "profile": profile, "answers": len(strict), "solved": sum(flag is True for flag in strict)}


def _files(folder: RunFolder) -> list[Row]:
    listed = []
    for file in sorted(path for path in folder.path.rglob("*") if path.is_file()):
        path = file.relative_to(folder.path)
        if path.parts[0] in _UNSETTLED or file.name.startswith(".") or file.name.endswith(".partial"):
            continue
        size = file.stat().st_size
        checksum = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _HASHED_UP_TO else None
        listed.append({"path": path.as_posix(), "bytes": size, "sha256": checksum})
    return listed


def write(connection: Connection, run: Run, record: Row) -> None:
    """Write the run over all that is recorded of it; its index row first, whose lock makes other recorders wait."""
    row = _run_row(run, record["content"])
    dialect = import_module(f"sqlalchemy.dialects.{connection.dialect.name}")  # of two, the one that is used
    put: Any = dialect.insert(runs).values(row)
    connection.execute(put.on_conflict_do_update(index_elements=["id"], set_=row))
    new = {
        documents: [{"run": row["id"], "metrics": json_ready(run.curves), "record": record}],
        evaluations: _evaluation_rows(run),
    }
    for table, rows in new.items():
        connection.execute(sa.delete(table).where(table.c.run == row["id"]))
        if rows:
            connection.execute(sa.insert(table), rows)


def _run_row(run: Run, content: str) -> Row:
    result = run.result
    parts = {name: digest(run.described.get(name)) if run.spec else None for name in ("task", "model")}
    return {
        "id": run_number(run.suite, run.run_id),
        "suite": run.suite,
        "run_id": run.run_id,
        "arm": run.arm,
        "experiment": run.experiment,
        **parts,
        **{name: getattr(result, name) for name in ("seed", "code_digest", "steps_asked", "steps_done")},
        "imported": result.imported is not None,
        "status": result.imported.status if result.imported is not None else None,
        "content": content,
    }


def _evaluation_rows(run: Run) -> list[Row]:
    """Return one row for each step and profile; of a step that was evaluated twice the last one counts."""
    number = run_number(run.suite, run.run_id)
    rows = [evaluation_row(evaluation) | {"run": number} for evaluation in run.result.evaluations]
    return list({(row["step"], row["profile"]): row for row in sorted(rows, key=lambda row: row["last"])}.values())


def evaluation_row(evaluation: Evaluation) -> Row:
    """Return an evaluation as a row of the index and of `--json`; `conditions` are its profile."""
    scores = {name: getattr(evaluation, name) for name in ("step", "last", "n", "mean_length", "kl")}
    scores |= {name: evaluation.score(name) for name in SCORES}
    return scores | {"profile": evaluation.profile.name, "conditions": evaluation.profile.as_json()}
