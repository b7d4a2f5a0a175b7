"""A foreign log becomes a run folder, so that it is listed, shown and judged beside our own, and survives a rebuild."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rl.lab.files import dumps, write_whole
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.tensorboard import EVENTS, read_tensorboard
from fp4rl.lab.foreign.trl import read_trl
from fp4rl.lab.foreign.verl import read_verl
from fp4rl.spec.mistakes import BadValue, NotThere

# What verl calls the share of validation problems solved (reward 1 or 0 for a rule-based scorer).
_ACCURACY = re.compile(r"val(?:-core)?/.+/(?:mean@\d+|acc(?:uracy)?(?:/mean@\d+)?)|val/test_score/.+")


@dataclass(frozen=True)
class Imported:
    """Where the log went, and what was found in it."""

    run: RunFolder
    dialect: str
    log: Joined
    already_there: bool


def read_log(path: Path) -> tuple[str, Joined]:
    """(dialect, numbers) of a log; the form is recognised from the content.

    Raises `NotThere` for a missing file, `BadValue` for one in which no step of a known form is found.
    """
    if not path.exists():
        raise NotThere(f"{path}: no such file or folder; name a verl log, a trainer_state.json or TensorBoard events")
    if path.is_dir() or path.match(EVENTS):
        dialect, log = "tensorboard", read_tensorboard(path)
    else:
        data = path.read_bytes()
        is_json = data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        dialect, log = ("trl", read_trl(data)) if is_json else ("verl", read_verl(data))
    if not log.steps:
        raise BadValue(
            f"{path}: no step found; known are verl console logs (lines 'step:1 - group/name:0.5'), "
            "a trainer_state.json with a log_history, and TensorBoard event files"
        )
    return dialect, log


def import_log(path: Path, root: Path, *, arm: str | None = None, seed: int | None = None) -> Imported:
    """Make `root/imported/<arm>-s<seed>-<digest of the content>` from a log. The same log twice is one run."""
    dialect, log = read_log(path)
    arm = arm or re.sub(r"[^A-Za-z0-9_.=+-]+", "-", path.name.removesuffix(".log").removesuffix(".json")).strip("-.")
    content = dumps({"steps": log.in_order()})
    checksum = hashlib.sha256(content.encode()).hexdigest()
    name = f"{arm}-s{seed}-{checksum[:12]}" if seed is not None else f"{arm}-{checksum[:12]}"
    run = run_folder(root, "imported", name)
    if run.finished:
        return Imported(run, dialect, log, already_there=True)
    lines = (dumps({"step": step, **values}) + "\n" for step, values in log.in_order().items())
    write_whole(run.path / "metrics.jsonl", "".join(lines))
    run.write_result(_result(run, log, arm, seed, {"dialect": dialect, "source": path.name, "sha256": checksum}))
    return Imported(run, dialect, log, already_there=False)


def _result(run: RunFolder, log: Joined, arm: str, seed: int | None, source: dict[str, Any]) -> dict[str, Any]:
    last = max(log.steps)
    return {
        "run_id": run.run_id,
        "suite": run.suite,
        "arm": arm,
        "seed": seed,
        "imported": source | {"conflicts": len(log.conflicts), "skipped": len(log.skipped)},
        "evaluations": list(_evaluations(log, last)),
        "evidence": {},
        "steps_done": last,
    }


def _evaluations(log: Joined, last: int) -> Iterator[dict[str, Any]]:
    """The validation scores among the metrics, as evaluations of which neither precision nor problems are known."""
    for step, values in log.in_order().items():
        for key, value in values.items():
            if _ACCURACY.fullmatch(key) and 0 <= value <= 1:
                name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", key)
                profile = {"name": name, "scorer": key}
                yield {"step": step, "last": step == last, "profile": profile, "n": None, "strict": value}
