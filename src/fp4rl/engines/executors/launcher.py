"""What a launcher of several processes (torchrun) asks of each: to know that there are others, and to leave cleanly."""

import os
import sys
from typing import NoReturn


def launched() -> bool:
    """Whether a launcher has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """End this process at once: tearing down a process group now and then aborts, after everything is done."""
    if code == 0:
        _wait_for_the_others()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_the_others() -> None:
    """The first to leave takes its connections along."""
    from contextlib import suppress

    from torch import distributed

    if distributed.is_initialized():
        with suppress(RuntimeError):  # whoever got through first may be gone already
            distributed.barrier()
