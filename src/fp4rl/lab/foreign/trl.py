"""TRL and other Hugging Face trainers: `trainer_state.json`, whose log history has several entries for one step."""

from pathlib import Path
from typing import Any

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.lines import plain_lines, text_of
from fp4rl.lab.foreign.records import join, parse_json, printed_record, tells_of_a_step
from fp4rl.spec.errors import InvalidValueError

STATE = "trainer_state.json"


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
    found = (printed_record(line) for line in plain_lines(data))
    return join(record for record in found if record is not None and tells_of_a_step(record))


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
