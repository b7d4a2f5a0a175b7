"""Write files so that a crash cannot damage them, whole or by lines of strict JSON; name those that cannot be read."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from fp4rl.rl.durable import sync
from fp4rl.spec.errors import InvalidValueError

_PARTIAL = ".partial"
# No file takes so long to write: an older partial file was left by a process that died.
_DEAD_S = 600
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of SQLite, safetensors, Arrow and torch for a full disk; their errors have no errno.
_SAY_FULL = ("disk is full", "No space left", "os error 28", "errno 28", "PytorchStreamWriter failed", "unexpected pos")
# What the libraries raise for a truncated, mixed-up or unreadable file.
_SYMPTOMS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file is then moved to `path`, or removed on an exception.

    A reader sees the old content or the new, never a part of it, even after a crash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    remove_partial(path.parent, f".{path.name}.*{_PARTIAL}", older_than_s=_DEAD_S)


def remove_partial(folder: Path, pattern: str = f"**/*{_PARTIAL}", older_than_s: float = 0.0) -> None:
    """Remove partial files that killed processes left in `folder`."""
    for left in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if left.is_file() and time.time() - left.stat().st_mtime >= older_than_s:
                left.unlink()


@contextmanager
def unwritable_named(folder: Path) -> Iterator[None]:
    """Raise InvalidValueError, which names `folder`, where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise InvalidValueError(f"cannot write to {folder}: {error.strerror}; give another place with --runs") from None


def write_whole(path: Path, text: str) -> None:
    """Write a text file as `whole` does; it is durable when this returns."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSON-lines file, one object a line."""
    write_whole(path, "".join(dumps(record) + "\n" for record in records))


def is_full(error: BaseException) -> bool:
    """Return whether an error, or any of its causes, means that a disk or a quota is full."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if getattr(cause, "errno", None) in _FULL or any(words in str(cause) for words in _SAY_FULL):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line. An unfinished last line, left by a crash, is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if size and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write((dumps(record) + "\n").encode())


def loads(line: bytes) -> Any:
    """Return what `json.loads` does, in a quarter of its time; where the fast parser raises, that of Python decides."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line.decode())


def read_lines(path: Path, read: Callable[[bytes], Any] = loads) -> Iterator[Any]:
    """Read each line of a file, none where there is no file; an unfinished last line is left out."""
    yield from map(read, finished_lines(path))


def finished_lines(path: Path) -> list[bytes]:
    """Return the lines of a file that are not blank, none where there is no file, without an unfinished last line."""
    try:
        *lines, _unfinished = path.read_bytes().split(b"\n")
    except FileNotFoundError:  # asked beforehand, a run that starts over could still remove it in between
        return []
    return [line for line in lines if line.strip()]


def dumps(value: Any) -> str:
    """Return one line of strict JSON; floats that JSON does not have become "nan", "inf" and "-inf"."""
    return json.dumps(json_ready(value), allow_nan=False, separators=(", ", ": "), ensure_ascii=False)


def json_ready(value: Any) -> Any:
    """Return the same content in values of strict JSON."""
    match value:
        case Mapping():
            return {str(key): json_ready(inner) for key, inner in value.items()}
        case list() | tuple():
            return [json_ready(inner) for inner in value]
        case float() if not math.isfinite(value):
            return str(value)
        case Path():
            return str(value)
    return value


class Damaged(InvalidValueError):
    """A file of a run, or its whole folder, is damaged. The message names it and the cure."""


OnDamaged = Callable[[Damaged], None]


@contextmanager
def damage_named(path: Path) -> Iterator[Path]:
    """Yield `path`; raise Damaged, in one line that names it, for any error while it is read."""
    try:
        yield path
    except Damaged:
        raise
    except (*_SYMPTOMS, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        why = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        why = reason if isinstance(error, InvalidValueError) else why
        raise Damaged(f"{path} is damaged ({why}); put back a copy, or move its run's folder away") from error


def tell(damaged: Iterable[Damaged], on_damaged: OnDamaged | None) -> None:
    """Pass each to `on_damaged`, or raise the first where there is none."""
    for error in damaged:
        if on_damaged is None:
            raise error
        on_damaged(error)
