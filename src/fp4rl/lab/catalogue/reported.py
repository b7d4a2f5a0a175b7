"""Numbers that the documents behind this work reported, with what speaks against each; shown beside one's own."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fp4rl.spec.errors import NotFoundError, nearest

_FILE = Path(__file__).with_name("reported.jsonl")


@dataclass(frozen=True)
class Reported:
    """One reported experiment. `accuracy` in percent, None where none was published; `settings` as they were given."""

    id: str
    accuracy: float | None
    step: int | None
    status: str
    confounds: tuple[str, ...]
    curve: tuple[tuple[int, float], ...]
    settings: dict[str, Any]

    def sentence(self) -> str:
        """Return one line: the number, and all that speaks against it."""
        number = "no number" if self.accuracy is None else f"{self.accuracy:.2f} %"
        where = f" at step {self.step}" if self.step is not None else ""
        against = f"; {'; '.join(self.confounds)}" if self.confounds else ""
        state = f" ({self.status})" if self.status != "completed" else ""
        return f"{self.id} reported {number}{where}{state}{against}"


@cache
def reported() -> dict[str, Reported]:
    """Return every reported experiment by its id."""
    records = [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]
    return {record["id"]: _read(record) for record in records}


def reported_as(name: str) -> Reported:
    """Return one reported experiment. Raises NotFoundError with the nearest id."""
    if name not in reported():
        raise NotFoundError(f"reported: no experiment {name!r} in the documents{nearest(name, reported())}")
    return reported()[name]


def _read(record: dict[str, Any]) -> Reported:
    kept = ("id", "final_accuracy", "final_eval_step", "status", "confounds", "curve")
    return Reported(
        id=record["id"],
        accuracy=record.get("final_accuracy"),
        step=record.get("final_eval_step"),
        status=record["status"],
        confounds=tuple(record.get("confounds", ())),
        curve=tuple((int(step), float(value)) for step, value in record.get("curve", ())),
        settings={key: value for key, value in record.items() if key not in kept},
    )
