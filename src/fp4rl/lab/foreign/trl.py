"""TRL and Hugging Face trainers: `trainer_state.json`, whose log history has several entries for one step."""

import json
from typing import Any

from fp4rl.lab.foreign.joined import Joined
from fp4rl.spec.mistakes import BadValue


def read_trl(data: bytes) -> Joined:
    """All entries of `log_history` joined by step. Raises `BadValue` for a file of another form."""
    try:
        content: Any = json.loads(data.decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise BadValue(f"line {error.lineno} is not JSON ({error.msg}); a trainer_state.json is one object") from None
    history = content.get("log_history") if isinstance(content, dict) else None
    if not isinstance(history, list):
        raise BadValue("a trainer_state.json has a list 'log_history'; this file has none")
    joined = Joined()
    for entry in history:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            joined.skipped.append(f"an entry without a step: {entry}"[:80])
            continue
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "step":
                joined.add(entry["step"], name, float(value))
            elif name != "step":
                joined.skipped.append(f"step {entry['step']}: {name}: {value}"[:80])
    return joined
