"""What the environment asks of a process, read here, at the doors: the rounding backend, and to be one of several."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from fp4rl.spec.errors import InvalidValueError

VARIABLE = "FP4RL_BACKEND"


def choose_backend(announce: Callable[[str], None]) -> None:
    """Force the backend that FP4RL_BACKEND names, `auto` without it; `announce` hears of compilations and their time.

    Raises InvalidValueError for a word that is no backend and for one that cannot work here.
    """
    from fp4rl.numerics.dispatch import use

    try:
        use(os.environ.get(VARIABLE) or "auto", announce)
    except InvalidValueError as error:
        raise InvalidValueError(f"{VARIABLE}: {error}") from None


def launched() -> bool:
    """Return whether a launcher has started this process beside others."""
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
