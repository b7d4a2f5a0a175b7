"""Read TensorBoard event files: every scalar of one run, whichever way it was written."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp4rl.lab.foreign.joined import Joined, step_of
from fp4rl.spec.errors import InvalidValueError, NotFoundError

EVENTS = "*tfevents*"


def read_tensorboard(path: Path) -> Joined:
    """Return the scalars of an event file, or of all event files of one folder, in the order of writing.

    A damaged record ends its file, as it does for TensorBoard itself. Raises `InvalidValueError` for a folder that
    holds several runs, `NotFoundError` where tensorboard is not installed.
    """
    joined = Joined()
    for file in _event_files(path):
        read = _take(joined, file)
        total = _records_in(file)
        if read < total:
            joined.skipped.append(f"{file.name}: damaged after {read} of {total} records")
    return joined


def _take(joined: Joined, file: Path) -> int:
    """Join the contents of a file; return how many of its records could be read."""
    step, values, read = 0, dict[str, Any](), 0
    for event in _events(file):
        read += 1
        started = event.session_log.status == event.session_log.START
        new = dict(_scalars(event)) if event.HasField("summary") else {}
        if started or (new and (event.step != step or values.keys() & new.keys())):
            _join(joined, step, values)  # torch writes an event for each scalar: those of one step become one line
            step, values = event.step, {}
        if started:
            joined.restarted(event.step)
        values |= new
    _join(joined, step, values)
    return read


def _join(joined: Joined, step: int, values: dict[str, Any]) -> None:
    if step_of(step) is not None:
        joined.row(step, values)
    elif values:
        joined.skipped.append(f"{step} is no step: {', '.join(values)}"[:80])


def _scalars(event: Any) -> Iterator[tuple[str, float | str]]:
    """Yield name and number of each scalar (a tensor without axes), or the shape of other tensors."""
    from tensorboard.util import tensor_util

    for value in event.summary.value:
        try:
            array = tensor_util.make_ndarray(value.tensor)
        except (TypeError, ValueError):
            yield value.tag, "a tensor that cannot be read"
            continue
        is_scalar = array.ndim == 0 and array.dtype.kind in "fiub"
        yield value.tag, float(array) if is_scalar else f"of shape {array.shape} and type {array.dtype}"


def _events(file: Path) -> Iterator[Any]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ModuleNotFoundError:
        raise NotFoundError("reading event files needs tensorboard: pip install 'fp4rl[train]'") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        yield from EventFileLoader(str(file)).Load()
    except DecodeError:
        return


def _records_in(file: Path) -> int:
    """Count the records of a file by their lengths (a record: 8 bytes of length, 4 of checksum, data, 4)."""
    data, offset, count = file.read_bytes(), 0, 0
    while offset < len(data):
        length = struct.unpack("<Q", data[offset : offset + 8])[0] if offset + 8 <= len(data) else 0
        offset += 16 + length
        count += 1
    return count


def _event_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.rglob(EVENTS))
    folders = sorted({file.parent for file in files})
    if not files:
        raise NotFoundError(f"{path}: no event file ({EVENTS}) in this folder")
    if len(folders) > 1:
        raise InvalidValueError(
            f"{path} holds {len(folders)} runs; name one of {', '.join(folder.name for folder in folders)}"
        )
    return files
