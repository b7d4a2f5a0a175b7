"""The logs of known trainers: verl's console, and TRL's and other Hugging Face trainers' state and console."""

import re
from pathlib import Path
from typing import Any

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.plain import number, plain_lines, step_of, text_of
from fp4rl.lab.foreign.records import join, parse_json, printed_record, tells_of_a_step
from fp4rl.spec.errors import InvalidValueError

STATE = "trainer_state.json"
_VERL_STEP = re.compile(r"(?:^|[^\w-])step:([0-9]+) - (.+)")


def read_verl(data: bytes) -> Joined:
    """All steps with all keys. A line counts when a key of it has verl's form `group/name` and a number."""
    joined = Joined()
    for line in plain_lines(data):
        match = _VERL_STEP.search(line)
        step = step_of(match[1]) if match else None
        if match is None or step is None:
            continue
        parts = [part.strip().rpartition(":") for part in match[2].split(" - ")]
        values = {name: value for name, _, value in parts if name}
        # An answer of the model, printed at validation, may hold the words "step:1 - ".
        if any("/" in name and number(value) is not None for name, value in values.items()):
            joined.row(step, values)
            joined.skipped += [f"step {step}: {rest}"[:80] for name, _, rest in parts if not name]
    return joined


def read_trl(data: bytes) -> Joined:
    """All entries of `log_history` joined by step. Raises `InvalidValueError` for a file of another form."""
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
    """The dicts that a trainer printed to its console, one a line among everything else."""
    records = (printed_record(line) for line in plain_lines(data))
    return join(record for record in records if record is not None and tells_of_a_step(record))


def newest_state(folder: Path) -> Path | None:
    """The trainer state in a checkpoint's folder, or that of the last checkpoint in a folder of them."""
    if (folder / STATE).is_file():
        return folder / STATE
    numbers = {
        int(path.parent.name.rpartition("-")[2]): path
        for path in folder.glob(f"checkpoint-*/{STATE}")
        if path.parent.name.rpartition("-")[2].isdecimal()
    }
    return numbers[max(numbers)] if numbers else None
