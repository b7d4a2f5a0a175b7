"""A foreign log becomes a run folder, so that it is listed, shown and judged beside our own, and survives a rebuild."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rl.lab.files import dumps, json_ready, write_whole
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.foreign.joined import Joined, readable
from fp4rl.lab.foreign.reader import read_log
from fp4rl.spec import records
from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.evidence import Evaluation, Profile
from fp4rl.spec.records import VERSION, RunResult, Summary

STATUSES = ("finished", "stopped", "failed", "running")

# What verl calls the share of validation problems solved (reward 1 or 0 for a rule-based scorer).
_ACCURACY = re.compile(r"val(?:-core)?/.+/(?:mean@\d+|acc(?:uracy)?(?:/mean@\d+)?)|val/test_score/.+")


@dataclass(frozen=True)
class Imported:
    """Where the log went, and what was found in it."""

    run: RunFolder
    dialect: str
    log: Joined
    already_there: bool


def import_log(
    path: Path,
    root: Path,
    *,
    arm: str | None = None,
    seed: int | None = None,
    config: Mapping[str, Any] | None = None,
    status: str | None = None,
    note: str | None = None,
) -> Imported:
    """Make `root/imported/<arm>-s<seed>-<digest of the content>` from a log. The same log twice is one run.

    `config`, `status` and `note` are what the log itself does not say: the trainer's settings, how the run ended (one
    of `STATUSES`), and a remark. Raises as `read_log` does, and `InvalidValueError` where the log is here already and
    described otherwise.
    """
    if status is not None and status not in STATUSES:
        raise InvalidValueError(f"no status {status!r}{nearest(status, STATUSES)}; one of {', '.join(STATUSES)}")
    dialect, log = read_log(path)
    told = {"config": config, "status": status, "note": note}
    known = {name: value for name, value in told.items() if value is not None}
    described = json.loads(json.dumps(json_ready(known), default=str))  # YAML knows dates besides what JSON has
    arm = arm or _arm(path)
    content = dumps({"steps": log.in_order()})
    checksum = hashlib.sha256(content.encode()).hexdigest()
    name = f"{arm}-s{seed}-{checksum[:12]}" if seed is not None else f"{arm}-{checksum[:12]}"
    run = run_folder(root, "imported", name)
    if run.finished:
        _refuse_other(run, described)
        return Imported(run, dialect, log, already_there=True)
    lines = (dumps({"step": step, **values}) + "\n" for step, values in log.in_order().items())
    write_whole(run.path / "metrics.jsonl", "".join(lines))
    source = {"dialect": dialect, "source": readable(path.name), "sha256": checksum, **described}
    run.write_result(_result(run, log, arm, seed, source))
    return Imported(run, dialect, log, already_there=False)


def _arm(path: Path) -> str:
    """The file's name, or the folder's where the file has the name that all of its kind have."""
    named = path.parent if path.stem in ("trainer_state", "logging", "metrics") and path.parent.name else path
    plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", re.sub(r"\.(log|json|jsonl|csv|txt)$", "", named.name))
    return plain.strip("-._+=")[:100] or "log"


def _refuse_other(run: RunFolder, described: Mapping[str, Any]) -> None:
    known = run.result().imported
    other = [name for name, value in described.items() if getattr(known, name, None) != value]
    if other:
        raise InvalidValueError(
            f"{run.key} is here already with another {' and '.join(other)}; remove {run.path} to import it again"
        )


def _result(run: RunFolder, log: Joined, arm: str, seed: int | None, source: dict[str, Any]) -> RunResult:
    last = max(log.steps)
    joined = {"went_back": len(log.went_back), "met_twice": log.met_twice, "left_behind": log.left_behind}
    source |= {**joined, "skipped": len(log.skipped)}
    return RunResult(
        version=VERSION,
        run_id=run.run_id,
        suite=run.suite,
        arm=arm,
        seed=seed,
        imported=records.Imported(**source),
        evaluations=tuple(_evaluations(log, last)),
        evidence=Summary(),
        steps_done=last,
    )


def _evaluations(log: Joined, last: int) -> Iterator[Evaluation]:
    """The validation scores among the metrics, as evaluations of which neither precision nor problems are known."""
    for step, values in log.in_order().items():
        for key, value in values.items():
            if _ACCURACY.fullmatch(key) and 0 <= value <= 1:
                name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", key)
                profile = Profile(name=name, scorer=key)
                yield Evaluation(step=step, last=step == last, profile=profile, n=None, strict=value)
