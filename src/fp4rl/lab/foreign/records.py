"""Read what trainers log: JSON, printed dicts, verl's console, TRL's `trainer_state.json`, tables."""

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fp4rl.lab.foreign.joined import Joined, number, plain_lines, readable, step_name, step_of, text_of
from fp4rl.spec.errors import InvalidValueError

Record = dict[str, Any]

_PAIR = re.compile(
    r"""(?P<quote>['"])(?P<name>(?:(?!(?P=quote)).){1,300})(?P=quote)\s*:\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<bare>[^\s,'"{}\[\]][^,'"{}\[\]]*))""",
    re.VERBOSE,
)
# Keys around the metrics that are not part of their names: verl's file logger, NeMo's metric logger.
_BOXES = ("data", "metrics", "logs")
_DEEPEST = 4
STATE = "trainer_state.json"
_VERL_STEP = re.compile(r"(?:^|[^\w-])step:([0-9]+) - (.+)")


def parse_json(text: str) -> Any:
    """Return the content of a JSON text. Raises ValueError for any error, too deep nesting included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_record(line: str) -> Record | None:
    """Return the object in a line of JSON, flattened; None where it is something else."""
    try:
        content = parse_json(line)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    if content.keys() == {"step", "data"} and isinstance(content["data"], dict):
        # verl's file logger writes with orjson, which writes NaN and infinity as null.
        content["data"] = {name: math.nan if value is None else value for name, value in content["data"].items()}
    return flat(content)


def printed_record(line: str) -> Record | None:
    """Return the pairs of a dict, in JSON or Python, somewhere in a line of a console; None without one.

    It is read pair by pair, because `nan` and `np.float64(0.5)` are not literals.
    """
    start, end = line.find("{"), line.rfind("}")
    if start < 0 or end < start:
        return None
    record = json_record(line[start : end + 1])
    if record is None:
        pairs = _PAIR.finditer(line, start, end)
        record = {pair["name"]: pair["single"] or pair["double"] or pair["bare"] or "" for pair in pairs}
    return record or None


def flat(record: Mapping[str, Any], above: str = "", depth: int = 0) -> Record:
    """Flatten nested mappings to paths, `group/name`; lists stay as they are and do not count as numbers."""
    by_path: Record = {}
    for name, value in record.items():
        path = above if not above.strip("/") and name in _BOXES and isinstance(value, Mapping) else f"{above}{name}"
        if isinstance(value, Mapping) and depth < _DEEPEST:
            by_path |= flat(value, f"{path}/" if path else "", depth + 1)
        else:
            by_path.setdefault(path, value)
    return by_path


def join(records: Iterable[Record]) -> Joined:
    """Join all records by their step. If no record has one they are numbered, else those without one are listed."""
    joined, nameless = Joined(), list[Record]()
    for record in records:
        name = step_name(record)
        step = step_of(record[name]) if name is not None else None
        if step is None:
            nameless.append(record)
        else:
            joined.row(step, {key: value for key, value in record.items() if key != name})
    if joined.steps:
        joined.skipped += [readable(f"a record without a step: {record}"[:80]) for record in nameless]
    else:
        _number(joined, nameless)
    return joined


def _number(joined: Joined, records: Iterable[Record]) -> None:
    """Number records without steps in their order; where `epoch` goes back, so do the numbers.

    An evaluation (`eval_...`) and the final summary (`train_runtime`) belong to the step before them.
    """
    joined.counted = True
    step, epochs = 0, dict[int, float]()
    for record in records:
        own = [name for name in record if name != "epoch"]
        if not all(name.startswith("eval_") for name in own) and "train_runtime" not in record:
            epoch = number(record.get("epoch"))
            step += 1
            if epoch is not None:
                if epoch < epochs.get(step - 1, epoch):
                    step = min((at for at, reached in epochs.items() if reached >= epoch and at < step), default=step)
                epochs[step] = epoch
        joined.row(step, record)


def tells_of_a_step(record: Record) -> bool:
    """Return whether a printed dict is about training: it has a step or, in Hugging Face trainers, an epoch."""
    name = step_name(record)
    named = name is not None and step_of(record[name]) is not None
    rest = [value for key, value in record.items() if key not in (name, "epoch")]
    return (named or number(record.get("epoch")) is not None) and any(number(value) is not None for value in rest)


def whole_file(text: str) -> tuple[list[Record], int] | None:
    """Return the records of JSON lines or of one JSON list, and the number of lines without one; None for other text.

    A line that was cut off by a crash, or mixed up by two writers, has no record.
    """
    if text.startswith("["):
        try:
            content = parse_json(text)
        except ValueError:
            return None
        records = [flat(entry) for entry in content if isinstance(entry, dict)]
        return (records, len(content) - len(records)) if records else None
    lines = [line for line in text.split("\n") if line.strip()]
    records = [record for line in lines if line.lstrip().startswith("{") and (record := json_record(line)) is not None]
    return (records, len(lines) - len(records)) if records and 2 * len(records) >= len(lines) else None


def read_verl(data: bytes) -> Joined:
    """Return all steps with all keys. A line counts when one of its keys has verl's form `group/name` and a number."""
    joined = Joined()
    for line in plain_lines(data):
        match = _VERL_STEP.search(line)
        step = step_of(match[1]) if match else None
        if match is None or step is None:
            continue
        parts = [part.strip().rpartition(":") for part in match[2].split(" - ")]
        values = {name: value for name, _, value in parts if name}
        # An answer of the model, printed during validation, may contain "step:1 - ".
        if any("/" in name and number(value) is not None for name, value in values.items()):
            joined.row(step, values)
            joined.skipped += [f"step {step}: {rest}"[:80] for name, _, rest in parts if not name]
    return joined


def read_trl(data: bytes) -> Joined:
    """Return all entries of `log_history` joined by step. Raises `InvalidValueError` for a file of another form."""
    try:
        content: Any = parse_json(text_of(data))
    except ValueError as error:
        raise InvalidValueError(f"it is no whole JSON ({error}); a {STATE} is one object") from None
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise InvalidValueError(f"a {STATE} has a list 'log_history'; this file has none")
    joined = join(entry for entry in history if isinstance(entry, dict))
    joined.skipped += [f"an entry that is no object: {entry}"[:80] for entry in history if not isinstance(entry, dict)]
    return joined


def read_printed(data: bytes) -> Joined:
    """Return the dicts that a trainer printed to its console, one a line, among other output."""
    records = (printed_record(line) for line in plain_lines(data))
    return join(record for record in records if record is not None and tells_of_a_step(record))


def newest_state(folder: Path) -> Path | None:
    """Return the trainer state in a checkpoint's folder, or of the last checkpoint in a folder of checkpoints."""
    if (folder / STATE).is_file():
        return folder / STATE
    numbers = {
        int(path.parent.name.rpartition("-")[2]): path
        for path in folder.glob(f"checkpoint-*/{STATE}")
        if path.parent.name.rpartition("-")[2].isdecimal()
    }
    return numbers[max(numbers)] if numbers else None


# -- tables with a step column: CSV and its relatives, wide (a column a metric) or long (a row a metric)

_DELIMITERS = ",;\t"
_NAMES, _VALUES = ("metric", "name", "tag", "key"), ("value",)
# A chart exported from W&B has columns `run - metric`, and the range of each.
_RANGES = ("__MIN", "__MAX")


def read_table(text: str) -> Joined | None:
    """Return all rows of a table; None where the first line has no step column."""
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
    """Yield rows of cells; an open quote, or a cell beyond the reader's limit, loses only its own line."""
    for line in lines:
        try:
            yield next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            yield [line]


def _long(names: list[str]) -> tuple[int, int] | None:
    """Return the columns of the metric's name and value, if each row holds one metric."""
    lower = [name.lower() for name in names]
    name = next((lower.index(word) for word in _NAMES if word in lower), None)
    value = next((lower.index(word) for word in _VALUES if word in lower), None)
    return None if name is None or value is None else (name, value)


def _plain(name: str) -> str:
    return name.rpartition(" - ")[2] if not name.endswith(_RANGES) else name


def _value(cell: str, delimiter: str) -> str:
    """Return the cell as Python writes numbers: with semicolons between cells, a comma is the decimal point."""
    cell = cell.strip()
    dotted = cell.replace(",", ".") if delimiter == ";" and cell.count(",") == 1 else cell
    return dotted if number(dotted) is not None else cell
