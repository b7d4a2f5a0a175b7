"""Everything that the ledger holds of one run, as plain values."""

from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from fp4rl.lab.compare.evidence import gaps
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.packing import unpack_flags, unpack_lengths, unpack_problems
from fp4rl.lab.ledger.query import find_run, rows_of_runs, specs
from fp4rl.spec.errors import NotFoundError

Row = dict[str, Any]


def about(connection: Connection, word: str) -> Row:
    """The run that `word` names, its spec, evaluations, evidence (and what is missing in it), curves, items and files.

    Raises as `find_run` does.
    """
    run = find_run(connection, word)
    digest = run["experiment"]
    spec = specs(connection, [digest])[digest] if digest else {}
    lines = rows_of_runs(connection, tables.evidence, [run["id"]])
    judged = rows_of_runs(connection, tables.evaluations, [run["id"]])
    foreign = ("it is a foreign log without evidence",)
    return {
        "run": run,
        "spec": spec,
        "evaluations": _without_run(judged),
        "gaps": foreign
        if run["imported"]
        else gaps(spec, run["evidence"], [line["content"] for line in lines], judged),
        "warnings": [str(line["content"].get("line")) for line in lines if line["kind"] == "warning"],
        "evidence_lines": dict(Counter(line["kind"] for line in lines)),
        "metrics": _curves(rows_of_runs(connection, tables.metrics, [run["id"]])),
        "items": _items(connection, run["id"]),
        "artefacts": _without_run(rows_of_runs(connection, tables.artefacts, [run["id"]])),
    }


def answers(connection: Connection, run: Row, problem: str, root: Path) -> list[Row]:
    """Every answer of a run to one problem; the text is None where the run's folder is not below `root`.

    Raises `NotFoundError` with the first ids that there are.
    """
    found: list[Row] = []
    known: set[str] = set()
    for row in rows_of_runs(connection, tables.items, [run["id"]]):
        query = select(tables.problem_lists.c.packed).where(tables.problem_lists.c.digest == row["problems"])
        names, samples = unpack_problems(connection.execute(query).scalar_one())
        known |= set(names)
        strict, lengths = unpack_flags(row["strict"], len(names)), unpack_lengths(row["lengths"])
        texts = _texts(RunFolder(root / run["suite"] / run["run_id"]), row, problem)
        found += [
            {
                "step": row["step"],
                "profile": row["profile"],
                "sample": samples[index],
                "strict": bool(strict[index]),
                "length": int(lengths[index]),
                "completion": texts.get(samples[index]),
            }
            for index, name in enumerate(names)
            if name == problem
        ]
    if not found:
        ids = f"; its {len(known)} problems are {', '.join(sorted(known)[:3])}, ..." if known else ""
        raise NotFoundError(f"{run['run_id']} has no answer to {problem!r}{ids}")
    return found


def _texts(folder: RunFolder, row: Row, problem: str) -> dict[int, str]:
    """Sample -> answer, from the Parquet file."""
    if (row["step"], row["profile"]) not in folder.item_sets():
        return {}
    kept = folder.items(row["step"], row["profile"], ["problem_id", "sample", "completion"]).to_pylist()
    return {line["sample"]: line["completion"] for line in kept if line["problem_id"] == problem}


def _items(connection: Connection, run: int) -> list[Row]:
    """How many answers each evaluation has, and how many are right."""
    found = []
    for row in rows_of_runs(connection, tables.items, [run]):
        query = select(tables.problem_lists.c.rows).where(tables.problem_lists.c.digest == row["problems"])
        count = connection.execute(query).scalar_one()
        solved = int(unpack_flags(row["strict"], count).sum())
        found.append({"step": row["step"], "profile": row["profile"], "answers": count, "solved": solved})
    return found


def _curves(rows: list[Row]) -> dict[str, Row]:
    """Name -> first, last, lowest, highest; None where a value was not a number."""
    values: dict[str, list[float | None]] = {}
    for row in rows:
        values.setdefault(row["name"], []).append(row["value"])
    return {name: _curve(numbers) for name, numbers in sorted(values.items())}


def _curve(numbers: list[float | None]) -> Row:
    known = [number for number in numbers if number is not None]
    extremes = (min(known), max(known)) if known else (None, None)
    return {
        "count": len(numbers),
        "first": numbers[0],
        "last": numbers[-1],
        "lowest": extremes[0],
        "highest": extremes[1],
    }


def _without_run(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "run"} for row in rows]
