"""The rows of a local JSONL, CSV or Parquet file, also compressed (.gz), each with the place where it stands."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO, cast

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

Record = tuple[str, Callable[[], Mapping[str, Any]]]
"""The place of a row, and a function that reads it: what is wrong with one row does not hide the others."""

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_MISSING: Any = object()


def records(path: Path) -> Iterator[Record]:
    """Yield every row of a file in its order; raises InvalidValueError for a file that is none of its kind."""
    kind = kind_of(path)
    if kind not in KINDS:
        known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise InvalidValueError(f"{path}: unknown kind of file {path.suffix!r}; give a {known} file, or one as .gz")
    read = {".parquet": _parquet, ".json": _json, ".jsonl": _jsonl}.get(kind, _csv)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from read(cast(BinaryIO, file), str(path))
    except (gzip.BadGzipFile, EOFError) as why:
        raise InvalidValueError(f"{path}: not a whole gzip file ({why}); compress it again") from None


def kind_of(path: Path) -> str:
    """Return the suffix of a file, below `.gz`, in small letters."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def written_at(path: str, what: str) -> tuple[int, int]:
    """Return size and modification time of a file. Raises NotFoundError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"{what} file {path!r} does not exist; give the path of a local .jsonl, .csv or .parquet")
    return file.stat().st_size, file.stat().st_mtime_ns


def cell(row: Mapping[str, Any], column: str, location: str, cure: str = "") -> Any:
    """Return what stands in a column; `a.b` is the field b of column a, unless a column has that name.

    Raises NotFoundError with the nearest column, or with `cure`, and InvalidValueError for what is missing.
    """
    value: Any = row.get(column, _MISSING)
    if value is _MISSING:
        value = row
        for part in column.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    if value is _MISSING:
        raise NotFoundError(f"{location}: no column {column!r}{nearest(column, map(str, row))}{cure}")
    if value is None or (isinstance(value, float) and isnan(value)):
        raise InvalidValueError(f"{location}: {column!r} is empty; fill it in, or take the row out")
    return value


def _jsonl(file: BinaryIO, path: str) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        location = f"{path}, line {number}"
        if line.strip():
            yield location, partial(_object, line, location)


def _json(file: BinaryIO, path: str) -> Iterator[Record]:
    """Yield the objects of one list, or those of lines."""
    content = file.read()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _jsonl(io.BytesIO(content), path)
        return
    for number, item in enumerate(_loaded(content, path), start=1):
        yield f"{path}, item {number}", partial(_require_object, item, f"{path}, item {number}")


def _object(line: bytes, location: str) -> Mapping[str, Any]:
    return _require_object(_loaded(line, location), location)


def _loaded(content: bytes, location: str) -> Any:
    try:
        return json.loads(_utf8(content, location))
    except (ValueError, RecursionError) as why:  # also numbers of thousands of digits, and too deep nesting
        if isinstance(why, InvalidValueError):
            raise
        reason = getattr(why, "msg", str(why).splitlines()[0])
        raise InvalidValueError(f"{location}: not JSON ({reason}); write one object a line") from None


def _require_object(item: Any, location: str) -> Mapping[str, Any]:
    if not isinstance(item, dict):
        raise InvalidValueError(f"{location}: no object; write one {{'question': ..., 'answer': ...}} a line")
    return item


def _utf8(line: bytes, location: str) -> str:
    """Return the line as text, without the byte order mark that a file may begin with."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidValueError(f"{location}: UTF-16, not UTF-8; save the file again as UTF-8")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        byte = f"0x{line[why.start]:02x}"
        raise InvalidValueError(f"{location}: byte {byte} is not UTF-8 (Latin-1?); save the file as UTF-8") from None


def _csv(file: BinaryIO, path: str) -> Iterator[Record]:
    """Yield the rows of a table with a header; the cells are parted by what the header holds most of: , ; or a tab.

    The csv module, not pyarrow's reader: it knows the line of every row.
    """
    lines = (_utf8(line, f"{path}, line {number}") for number, line in enumerate(file, start=1))
    head = next(lines, "")
    rows = csv.reader(_again(head, lines), delimiter=max(",;\t", key=head.count), strict=True)
    header: list[str] = []
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            cells = next(rows, None)
        except csv.Error as why:
            raise InvalidValueError(f"{where}: not CSV ({why}); quote the cell, or save it again") from None
        if cells is None:
            return
        if not header:
            header = [name.strip() for name in cells]
        elif any(cells):
            yield where, partial(_cells, header, cells, where)


def _again(head: str, lines: Iterator[str]) -> Iterator[str]:
    yield head
    yield from lines


def _cells(header: list[str], cells: list[str], location: str) -> Mapping[str, Any]:
    if len(cells) != len(header):
        raise InvalidValueError(
            f"{location}: {len(cells)} cells below {len(header)} columns; quote the cell that holds the separator"
        )
    return {name: text if text.strip() else None for name, text in zip(header, cells, strict=True)}


def _parquet(file: BinaryIO, path: str) -> Iterator[Record]:
    import pyarrow as pa  # only here: a reader of text should not pay for it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(file.read()))
    except (pa.ArrowInvalid, OSError) as why:
        raise InvalidValueError(f"{path}: not a Parquet file ({str(why).splitlines()[0]})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", partial(_require_object, row, f"{path}, row {number}")
