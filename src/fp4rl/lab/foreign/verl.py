"""verl's console log: lines `step:3 - actor/entropy:0.064 - ...` among everything else a job prints."""

import re

from fp4rl.lab.foreign.joined import Joined
from fp4rl.lab.foreign.lines import plain_lines
from fp4rl.lab.foreign.numbers import number, step_of

_STEP = re.compile(r"(?:^|[^\w-])step:([0-9]+) - (.+)")


def read_verl(data: bytes) -> Joined:
    """All steps with all keys. A line counts when a key of it has verl's form `group/name` and a number."""
    joined = Joined()
    for line in plain_lines(data):
        match = _STEP.search(line)
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
