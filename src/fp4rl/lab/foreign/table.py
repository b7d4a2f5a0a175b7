"""Tables with a step column: CSV and its relatives, wide (a column a metric) or long (a row a metric)."""

import csv
from collections.abc import Iterator

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.plain import number, step_name, step_of

_DELIMITERS = ",;\t"
_NAMES, _VALUES = ("metric", "name", "tag", "key"), ("value",)
# A chart of W&B exports `run - metric`, and beside it the range that it drew.
_RANGES = ("__MIN", "__MAX")


def read_table(text: str) -> Joined | None:
    """All rows of a table; None where the first line names no step column."""
    lines = text.lstrip().splitlines()
    header = lines[0] if lines else ""
    delimiter = max(_DELIMITERS, key=header.count)
    if delimiter not in header:
        return None
    rows = _rows(lines, delimiter)
    names = [name.strip() for name in next(rows, [])]
    step = step_name(dict.fromkeys(names))
    if step is None:
        return None
    joined, at = Joined(), names.index(step)
    long = _long(names)
    for row in rows:
        row_step = step_of(_value(row[at], delimiter)) if at < len(row) else None
        if row_step is None:
            joined.skipped.append(f"a row without a step: {delimiter.join(row)}"[:80])
        elif long:
            joined.row(row_step, {row[long[0]]: _value(row[long[1]], delimiter)} if len(row) > max(long) else {})
        else:
            cells = {_plain(name): _value(cell, delimiter) for name, cell in zip(names, row, strict=False)}
            wanted = (name for name, cell in cells.items() if cell and name != step and not name.endswith(_RANGES))
            joined.row(row_step, {name: cells[name] for name in wanted})
    return joined


def _rows(lines: list[str], delimiter: str) -> Iterator[list[str]]:
    """Rows of cells; a quote that never ends, or a cell beyond the reader's limit, costs its own line alone."""
    for line in lines:
        try:
            yield next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            yield [line]


def _long(names: list[str]) -> tuple[int, int] | None:
    """Where the metric's name and its value stand, if a row holds one metric."""
    lower = [name.lower() for name in names]
    name = next((lower.index(word) for word in _NAMES if word in lower), None)
    value = next((lower.index(word) for word in _VALUES if word in lower), None)
    return None if name is None or value is None else (name, value)


def _plain(name: str) -> str:
    return name.rpartition(" - ")[2] if not name.endswith(_RANGES) else name


def _value(cell: str, delimiter: str) -> str:
    """The cell as Python writes numbers: where semicolons part the cells, a comma is the decimal point."""
    cell = cell.strip()
    dotted = cell.replace(",", ".") if delimiter == ";" and cell.count(",") == 1 else cell
    return dotted if number(dotted) is not None else cell
