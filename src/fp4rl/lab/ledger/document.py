"""A finished run as one document, and the rows of the index that are made from it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert
from sqlalchemy.dialects import postgresql, sqlite

from fp4rl.lab.damage import damage_named
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.spec.digest import digest
from fp4rl.spec.task import SCORES

Row = dict[str, Any]

# Written while or after the result is, so their content is not settled by it.
_UNSETTLED = ("log.txt", "tensorboard", "wandb")
_HASHED_UP_TO = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Document:
    """Everything that the ledger keeps of one run. `content` is the SHA-256 of its `result.json`.

    `items`: answers and solved problems of each evaluation; the answers themselves stay in the folder. `files`: path,
    bytes and SHA-256 of each file. `metrics`: step -> name -> value.
    """

    suite: str
    run_id: str
    content: str
    spec: Row
    sites_digest: str | None
    result: Row
    evidence: list[Row]
    items: list[Row]
    files: list[Row]
    metrics: Mapping[Any, Mapping[str, Any]]

    @property
    def number(self) -> int:
        """The run's key in every table."""
        return tables.run_number(self.suite, self.run_id)

    @property
    def experiment(self) -> Row:
        """Digests of the spec without its seed, and of its task and model; empty for a foreign log."""
        described = {key: value for key, value in self.spec.items() if key != "seed"}
        parts = {name: digest(described.get(name)) for name in ("task", "model")}
        return {"experiment": digest(described), **parts} if self.spec else {}


def document_of(folder: RunFolder) -> Document:
    """Read a run's folder. Raises `NotFoundError` for a run that is not finished, `Damaged` for an unreadable one."""
    if not folder.finished:
        folder.result()
    with damage_named(folder.path):
        result, spec, evidence = folder.result(), folder.spec(), folder.evidence()
        if spec and result.get("spec_digest") not in (None, digest(spec)):  # YAML that lost its end can still be YAML
            raise ValueError("spec.yaml is not what its result was computed from")
        if not all(isinstance(line.get("kind"), str) for line in evidence):
            raise ValueError("evidence.jsonl has a line without its kind")
        if not isinstance(sites := folder.sites().get("digest"), str | None):
            raise ValueError("sites.json has a digest that is no text")
        items = [_counted(folder, step, profile) for step, profile in folder.item_sets()]
        names = (folder.suite, folder.run_id, content_of(folder))
        return Document(*names, spec, sites, result, evidence, items, _files(folder), folder.metrics())


def content_of(folder: RunFolder) -> str:
    """SHA-256 of `result.json`, which is written last and never again; empty where there is none."""
    file = folder.path / "result.json"
    with damage_named(file):
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _counted(folder: RunFolder, step: int, profile: str) -> Row:
    strict = folder.items(step, profile).column("strict").to_pylist()  # the whole file is read: damage shows now
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


def write(connection: Connection, document: Document) -> None:
    """Put the run in place of what is there of it.

    Its own row comes first: whoever holds it keeps others that record the same run waiting.
    """
    row = _run_row(document)
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    put: Any = dialect.insert(tables.runs).values(row)
    connection.execute(put.on_conflict_do_update(index_elements=["id"], set_=row))
    record = asdict(document)
    new = {
        tables.documents: [{"run": document.number, "metrics": record.pop("metrics"), "record": record}],
        tables.evaluations: _evaluation_rows(document),
    }
    for table, rows in new.items():
        connection.execute(delete(table).where(table.c.run == document.number))
        if rows:
            connection.execute(insert(table), rows)


def _run_row(document: Document) -> Row:
    result, imported = document.result, document.result.get("imported")
    return {
        "id": document.number,
        "suite": document.suite,
        "run_id": document.run_id,
        "arm": result.get("arm") or document.run_id,
        **dict.fromkeys(("experiment", "task", "model")),
        **document.experiment,
        **{name: result.get(name) for name in ("seed", "code_digest", "steps_asked", "steps_done")},
        "imported": imported is not None,
        "status": imported.get("status") if imported is not None else None,
        "content": document.content,
    }


def _evaluation_rows(document: Document) -> list[Row]:
    """One a step and profile; a step that was evaluated twice counts as it was evaluated last."""
    rows = [_evaluation_row(evaluation, document.number) for evaluation in document.result.get("evaluations") or ()]
    return list({(row["step"], row["profile"]): row for row in sorted(rows, key=lambda row: row["last"])}.values())


def _evaluation_row(evaluation: Row, number: int) -> Row:
    profile = evaluation.get("profile") or {}
    scores = {name: evaluation.get(name) for name in ("n", *SCORES, "mean_length")}
    key = {"run": number, "step": evaluation["step"], "profile": profile.get("name") or "full"}
    return key | {"last": bool(evaluation.get("last")), "conditions": profile} | scores
