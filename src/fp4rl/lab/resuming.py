"""What the same command does with an unfinished run: it goes on from a checkpoint, or starts from the beginning."""

from pathlib import Path

from fp4rl.lab.provenance import code_digest
from fp4rl.rl.checkpoints import all_of


def what_follows(folder: Path) -> str:
    """Return how the same command treats the unfinished run in `folder`, as the end of a sentence about that command.

    The checkpoint that it names is complete and of this code; whether its files are undamaged is seen when it is read.
    """
    step = max(all_of(folder / "checkpoints", code_digest()), default=None)
    if step is None:
        return "starts it from the beginning: it has no checkpoint yet"
    return f"goes on from its last checkpoint, after step {step}"
