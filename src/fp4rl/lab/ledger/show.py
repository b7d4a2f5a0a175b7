"""Everything that the run's folder and the ledger tell of one run."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger.document import Row, evaluation_row
from fp4rl.lab.ledger.query import documents_of, find_run
from fp4rl.lab.runs import Run, read_run
from fp4rl.spec.errors import NotFoundError


@dataclass(frozen=True)
class About:
    """A run, its row in the ledger's index, how many answers each evaluation has, and its files."""

    run: Run
    index: Row
    items: Sequence[Row]
    files: Sequence[Row]

    @property
    def curves(self) -> dict[str, Row]:
        """Name -> first, last, lowest, highest; None where a value was not a number."""
        return _curves(self.run.curves.values())

    @property
    def lines(self) -> dict[str, int]:
        """Kind of evidence -> how many lines there are."""
        return dict(Counter(line.kind for line in self.run.lines))

    def as_dict(self) -> Row:
        """Plain values for a program."""
        run, result = self.run, self.run.result
        return {
            "run": self.run_row(),
            "spec": run.described,
            "evaluations": [evaluation_row(evaluation) for evaluation in result.evaluations],
            "gaps": run.gaps,
            "warnings": run.warnings,
            "evidence_lines": self.lines,
            "metrics": self.curves,
            "items": self.items,
            "artefacts": self.files,
        }

    def run_row(self) -> Row:
        """The run itself, as plain values."""
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
    """The run that `word` names, out of its folder below `root` or else the ledger. Raises as `find_run` does."""
    index = find_run(connection, word)
    folder = RunFolder(root / index["suite"] / index["run_id"])
    document = documents_of(connection, [index["id"]], metrics=True)[index["id"]]
    run = read_run(folder) if folder.finished else document.run
    return About(run, index, document.items, document.files)


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


def _curves(steps: Iterable[Mapping[str, float]]) -> dict[str, Row]:
    """Name -> first, last, lowest, highest; None where a value was not a number."""
    values: dict[str, list[float | None]] = {}
    for step in steps:
        for name, value in step.items():
            values.setdefault(name, []).append(None if math.isnan(value) else value)
    return {name: _curve(numbers) for name, numbers in sorted(values.items())}


def _curve(numbers: list[float | None]) -> Row:
    known = [number for number in numbers if number is not None]
    lowest, highest = (min(known), max(known)) if known else (None, None)
    return {"count": len(numbers), "first": numbers[0], "last": numbers[-1], "lowest": lowest, "highest": highest}
