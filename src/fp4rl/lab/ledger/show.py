"""Everything that the ledger and the run's folder tell of one run, as plain values."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection

from fp4rl.lab.compare.evidence import gaps
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.document import Row
from fp4rl.lab.ledger.query import documents_of, find_run, rows_of_runs
from fp4rl.spec.errors import NotFoundError


def about(connection: Connection, word: str) -> Row:
    """The run that `word` names, its spec, evaluations, evidence (and what is missing in it), curves, items and files.

    Raises as `find_run` does.
    """
    index = find_run(connection, word)
    document = documents_of(connection, [index["id"]], metrics=True)[index["id"]]
    result, lines = document.result, document.evidence
    summary, imported = result.get("evidence") or {}, result.get("imported")
    evaluations = rows_of_runs(connection, tables.evaluations, [index["id"]])
    named = ("id", "suite", "run_id", "arm", "seed", "experiment", "code_digest", "steps_asked", "steps_done")
    run = {name: index[name] for name in (*named, "content")} | {
        "spec_digest": result.get("spec_digest"),
        "sites_digest": document.sites_digest,
        "wall_s": result.get("wall_s"),
        "versions": result.get("versions") or {},
        "evidence": summary,
        "imported": imported,
    }
    foreign = ("it is a foreign log without evidence",)
    return {
        "run": run,
        "spec": {key: value for key, value in document.spec.items() if key != "seed"},
        "evaluations": [{name: value for name, value in row.items() if name != "run"} for row in evaluations],
        "gaps": foreign if imported else gaps(document.spec, summary, lines, evaluations),
        "warnings": [str(line.get("line")) for line in lines if line["kind"] == "warning"],
        "evidence_lines": dict(Counter(line["kind"] for line in lines)),
        "metrics": _curves(document.metrics.values()),
        "items": document.items,
        "artefacts": document.files,
    }


def answers(folder: RunFolder, problem: str) -> list[Row]:
    """Every answer of a run to one problem. Raises `NotFoundError` with the first ids that there are."""
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


def _curves(steps: Iterable[Mapping[str, Any]]) -> dict[str, Row]:
    """Name -> first, last, lowest, highest; None where a value was not a number."""
    values: dict[str, list[float | None]] = {}
    for step in steps:
        for name, value in step.items():
            number = float(value)  # also of "nan" and "inf"
            values.setdefault(name, []).append(None if math.isnan(number) else number)
    return {name: _curve(numbers) for name, numbers in sorted(values.items())}


def _curve(numbers: list[float | None]) -> Row:
    known = [number for number in numbers if number is not None]
    lowest, highest = (min(known), max(known)) if known else (None, None)
    return {"count": len(numbers), "first": numbers[0], "last": numbers[-1], "lowest": lowest, "highest": highest}
