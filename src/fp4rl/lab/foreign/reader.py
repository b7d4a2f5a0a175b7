"""Read a log of any known form, recognised by its content, and import it.

An imported log becomes a run folder, so that it is listed, shown and judged like any run, and a rebuild keeps it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rl.lab.files import dumps, json_ready, write_whole
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.foreign.joined import Joined, readable, text_of
from fp4rl.lab.foreign.records import (
    STATE,
    join,
    newest_state,
    read_printed,
    read_table,
    read_trl,
    read_verl,
    whole_file,
)
from fp4rl.lab.foreign.tensorboard import EVENTS, read_tensorboard
from fp4rl.spec import records
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.evidence import Evaluation, Profile
from fp4rl.spec.records import VERSION, RunResult, Summary
from fp4rl.spec.words import counted

KNOWN = (
    "verl logs (console or file logger), trainer_state.json, the dicts that a trainer prints, JSON lines "
    "(ms-swift's logging.jsonl), CSV with a step column, and TensorBoard events"
)
_SWIFT = "logging.jsonl"
_METRICS = "metrics.jsonl"  # of a run of fp4rl
STATUSES = ("finished", "stopped", "failed", "running")

# What verl calls the share of validation problems solved (reward 1 or 0 for a rule-based scorer).
_ACCURACY = re.compile(r"val(?:-core)?/.+/(?:mean@\d+|acc(?:uracy)?(?:/mean@\d+)?)|val/test_score/.+")


def read_log(path: Path) -> tuple[str, Joined]:
    """Return (form, numbers) of a log, or of the log in a folder (a TRL checkpoint, ms-swift's output, event files).

    Raises `NotFoundError` for a missing file, `InvalidValueError` for one in which no step of a known form is found.
    """
    try:
        form, log = _read(_file_in(path))
    except InvalidValueError as error:
        raise InvalidValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror or error}; known are {KNOWN}") from None
    if not log.steps:
        raise InvalidValueError(f"{path}: no step found; known are {KNOWN}")
    return form, log


def _file_in(path: Path) -> Path:
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder; known are {KNOWN}")
    if not path.is_dir():
        return path
    swift = path / _SWIFT
    log = newest_state(path) or (swift if swift.is_file() else None)
    if log is None and next(path.rglob(EVENTS), None) is None:
        raise NotFoundError(f"{path}: no log of a known form in this folder; name the file itself; known are {KNOWN}")
    return log or path


def _read(path: Path) -> tuple[str, Joined]:
    if path.is_dir() or path.match(EVENTS):
        return "tensorboard", read_tensorboard(path)
    data = path.read_bytes()
    text = text_of(data).strip()
    if path.name == STATE or (text.startswith("{") and '"log_history"' in text and "\n{" not in text):
        return "trl", read_trl(data)
    whole = whole_file(text)
    if whole is not None:
        records, torn = whole
        log = join(records)
        log.skipped += [f"{counted(torn, 'line')} without a whole record"] if torn else []
        return "json", log
    for form, read in (("verl", read_verl), ("printed", read_printed)):
        log = read(data)
        if log.steps:
            return form, log
    return "table", read_table(text) or Joined()


def read_steps(log: Path) -> tuple[str, Joined]:
    """Return (form, numbers) of a log, or of a run of fp4rl with its evaluations as `accuracy/validation`.

    Raises NotFoundError and InvalidValueError for what cannot be read.
    """
    folder = log.parent if log.name == _METRICS else log
    if not (folder / _METRICS).is_file():
        return read_log(log)
    _, joined = read_log(folder / _METRICS)
    run = RunFolder(folder)
    for name in ("full", "deployment") if run.finished else ():  # the second counts: it samples in that precision
        for evaluation in run.result().evaluations:
            if evaluation.profile.name == name:
                joined.steps.setdefault(evaluation.step, {})["accuracy/validation"] = evaluation.strict
    return "fp4rl", joined


@dataclass(frozen=True)
class Imported:
    """The run folder of an imported log, and the log's contents."""

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
    """Import a log as `root/imported/<arm>-s<seed>-<digest of the content>`; the same log again is the same run.

    `config`, `status` and `note` are not in the log itself: the trainer's settings, how the run ended (one of
    `STATUSES`), and a remark. Raises what `read_log` raises, and `InvalidValueError` for a log that was imported before
    with another description.
    """
    if status is not None and status not in STATUSES:
        raise InvalidValueError(f"no status {status!r}{nearest(status, STATUSES)}; one of {', '.join(STATUSES)}")
    dialect, log = read_log(path)
    given = {"config": config, "status": status, "note": note}
    known = {name: value for name, value in given.items() if value is not None}
    described = json.loads(json.dumps(json_ready(known), default=str))  # YAML has dates, JSON does not
    arm = arm or _arm(path)
    content = dumps({"steps": log.in_order()})
    checksum = hashlib.sha256(content.encode()).hexdigest()
    name = f"{arm}-s{seed}-{checksum[:12]}" if seed is not None else f"{arm}-{checksum[:12]}"
    run = run_folder(root, "imported", name)
    if run.finished:
        before = run.result().imported
        if other := [name for name, value in described.items() if getattr(before, name, None) != value]:
            raise InvalidValueError(
                f"{run.key} is here already with another {' and '.join(other)}; remove {run.path} to import it again"
            )
        return Imported(run, dialect, log, already_there=True)
    lines = (dumps({"step": step, **values}) + "\n" for step, values in log.in_order().items())
    write_whole(run.path / "metrics.jsonl", "".join(lines))
    source = {"dialect": dialect, "source": readable(path.name), "sha256": checksum, **described}
    run.write_result(_result(run, log, arm, seed, source))
    return Imported(run, dialect, log, already_there=False)


def _arm(path: Path) -> str:
    """Return the file's name, or the folder's where the file's name is the same for every run."""
    named = path.parent if path.stem in ("trainer_state", "logging", "metrics") and path.parent.name else path
    plain = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", re.sub(r"\.(log|json|jsonl|csv|txt)$", "", named.name))
    return plain.strip("-._+=")[:100] or "log"


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
    """Yield the validation scores among the metrics as evaluations, of unknown precision and problems."""
    for step, values in log.in_order().items():
        for key, value in values.items():
            if _ACCURACY.fullmatch(key) and 0 <= value <= 1:
                name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", key)
                profile = Profile(name=name, scorer=key)
                yield Evaluation(step=step, last=step == last, profile=profile, n=None, strict=value)
