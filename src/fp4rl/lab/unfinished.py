"""A run without a result, failed or under way: why, how far it is, and everything that its folder holds."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4rl.lab.files import json_ready
from fp4rl.lab.folders import RunFolder, all_runs
from fp4rl.lab.ledger.query import curves_of
from fp4rl.lab.ledger.tables import Row, evaluation_row
from fp4rl.lab.resuming import what_follows
from fp4rl.lab.status import Status, status_of
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evidence import Warned
from fp4rl.spec.load import read_yaml

_RUN_ID = re.compile(r"(.+)-s(\d+)-[0-9a-f]+")
_TAIL = 8  # lines of the log


@dataclass(frozen=True)
class Unfinished:
    """A run of which there is no result.json."""

    folder: RunFolder

    @cached_property
    def status(self) -> Status:
        """What has become of it, why, and since when."""
        return status_of(self.folder, None)

    def run_row(self) -> dict[str, Any]:
        """Return the run itself as plain values."""
        done, planned = self.steps
        return self.row | self.status.as_dict() | {"steps_done": done, "steps_asked": planned}

    @property
    def row(self) -> dict[str, Any]:
        """Its suite, id, arm and seed."""
        parts = _RUN_ID.fullmatch(self.folder.run_id)
        arm, seed = (parts[1], int(parts[2])) if parts else (self.folder.run_id, None)
        return {"suite": self.folder.suite, "run_id": self.folder.run_id, "arm": arm, "seed": seed}

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The described experiment."""
        return self.folder.spec()

    @property
    def steps(self) -> tuple[int, int | None]:
        """How many steps are done, and how many were asked for."""
        return len(self.folder.metrics()), (self.spec.get("training") or {}).get("steps")

    @property
    def curves(self) -> dict[str, Row]:
        """Name -> first, last, lowest, highest of its metrics."""
        return curves_of(self.folder.metrics().values())

    @property
    def warnings(self) -> list[str]:
        """Its warnings, each once."""
        return list(dict.fromkeys(line.line for line in self.folder.evidence() if isinstance(line, Warned)))

    @property
    def log(self) -> Path:
        """Its log, which a run writes that has something to say."""
        return self.folder.path / "log.txt"

    @property
    def log_tail(self) -> list[str]:
        """The last lines of the log."""
        try:
            return self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        except FileNotFoundError:
            return []

    @property
    def goes_on(self) -> str:
        """How to go on with it."""
        if self.status.word == "running":
            return f"`fp4rl watch {self.folder.key}` follows it"
        suite = self.folder.path.parent / "suite.yaml"
        if not suite.is_file() or "arms" not in read_yaml(suite):  # of a single experiment the name is its file's
            return f"the same `fp4rl run` {what_follows(self.folder.path)}"
        root = "" if suite.parent.parent == Path("runs") else f" --runs {suite.parent.parent}"
        return f"`fp4rl run {suite}{root}` {what_follows(self.folder.path)}"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        told = {"run": self.run_row(), "spec": self.spec}
        evaluations = [evaluation_row(evaluation) for evaluation in self.folder.evaluations()]
        logs = {"log": str(self.log) if self.log.is_file() else None, "log_tail": self.log_tail}
        more = {"evaluations": evaluations, "warnings": self.warnings, "metrics": self.curves, "next": self.goes_on}
        return dict(json_ready(told | more | logs))


def unfinished_named(root: Path, name: str) -> Unfinished | None:
    """Return the unfinished run that `suite/run-id`, a run id, or the beginning of either names; None where none does.

    Raises InvalidValueError where several begin so.
    """
    runs = [folder for folder in all_runs(root) if not folder.finished]
    meant = [run for run in runs if name in (run.key, run.run_id)] or [
        run for run in runs if run.key.startswith(name) or run.run_id.startswith(name)
    ]
    if len(meant) > 1:
        keys = ", ".join(run.key for run in meant[:4])
        raise InvalidValueError(f"{len(meant)} unfinished runs begin with {name!r}: {keys}; name more of it")
    return Unfinished(meant[0]) if meant else None
