"""verl's console log: lines `step:3 - actor/entropy:0.064 - ...` among everything else a job prints."""

import re

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.lines import plain_lines

_STEP = re.compile(r"(?:^|[^\w-])step:(\d+) - (.+)")
_NUMBER = re.compile(
    r"(?:(?:np|numpy)\.\w+\(|tensor\()?([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf))\)?", re.I
)


def read_verl(data: bytes) -> Joined:
    """All steps with all keys. A line counts when a key of it has verl's form `group/name` and a number."""
    joined = Joined()
    for line in plain_lines(data):
        match = _STEP.search(line)
        if match:
            _take(joined, int(match[1]), match[2])
    return joined


def _take(joined: Joined, step: int, text: str) -> None:
    parts = [part.strip().rpartition(":") for part in text.split(" - ")]
    numbers = [(name, _number(value)) for name, _, value in parts]
    if not any("/" in name and value is not None for name, value in numbers):
        return  # an answer of the model, printed at validation, may hold the words "step:1 - "
    for (name, value), (_, _, raw) in zip(numbers, parts, strict=True):
        if name and value is not None:
            joined.add(step, name, value)
        else:
            joined.skipped.append(f"step {step}: {name}:{raw}"[:80])


def _number(text: str) -> float | None:
    """The value as verl prints it: a Python number, or since NumPy 2 `np.float64(0.5)`."""
    match = _NUMBER.fullmatch(text.strip())
    return float(match[1]) if match else None
