"""Reading a log of any known form, told by its content; of a folder, the log in it."""

from pathlib import Path

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.foreign.joined import Joined, text_of
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
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.words import counted

KNOWN = (
    "verl logs (console or file logger), trainer_state.json, the dicts that a trainer prints, JSON lines "
    "(ms-swift's logging.jsonl), CSV with a step column, and TensorBoard events"
)
_SWIFT = "logging.jsonl"
_METRICS = "metrics.jsonl"  # of a run of ours


def read_log(path: Path) -> tuple[str, Joined]:
    """Read a log, or the log in a folder (a checkpoint of TRL, an output of ms-swift, event files): (form, numbers).

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
    """Read a log, or a run of ours with its evaluations as `accuracy/validation`: (form, numbers).

    Raises NotFoundError and InvalidValueError for what cannot be read.
    """
    folder = log.parent if log.name == _METRICS else log
    if not (folder / _METRICS).is_file():
        return read_log(log)
    _, joined = read_log(folder / _METRICS)
    run = RunFolder(folder)
    for name in ("full", "deployment") if run.finished else ():  # the second, at which the policy samples, wins
        for evaluation in run.result().evaluations:
            if evaluation.profile.name == name:
                joined.steps.setdefault(evaluation.step, {})["accuracy/validation"] = evaluation.strict
    return "fp4rl", joined
