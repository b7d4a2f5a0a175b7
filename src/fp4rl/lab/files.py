"""Files that a crash cannot spoil: written whole or appended to line by line, in strict JSON."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as one line. A half-written last line, left by a crash, is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _cut_torn_line(file)
        file.write((dumps(record) + "\n").encode())


def _cut_torn_line(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file; a last line without its end is not yet written."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def dumps(value: Any) -> str:
    """One line of strict JSON; floats that JSON has no word for become "nan", "inf" and "-inf"."""
    return json.dumps(json_ready(value), allow_nan=False, separators=(", ", ": "), ensure_ascii=False)


def json_ready(value: Any) -> Any:
    """The same content in the values that strict JSON has."""
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
