"""What a launcher of several processes (torchrun) asks of each: to know that there are others, and to leave cleanly."""

import os
import sys
from contextlib import suppress
from typing import NoReturn


def launched() -> bool:
    """Whether a launcher has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """End this process at once: tearing down a process group now and then aborts, after everything is done."""
    if code == 0:
        from torch import distributed

        if distributed.is_initialized():  # the first to leave takes its connections along, so they leave together
            with suppress(RuntimeError):  # whoever got through first may be gone already
                distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
