"""A crash below Python leaves no traceback: the stacks of all threads are written into the run's own log instead."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How faulthandler begins; what a segmentation fault is told by.
FATAL = "Fatal Python error"


@contextmanager
def faults_kept(log: Path) -> Iterator[None]:
    """While this is open, a segmentation fault, an abort or a bus error appends its stacks to `log`.

    Where faulthandler is on already, somebody asked to have them elsewhere.
    """
    if faulthandler.is_enabled():
        yield
        return
    with log.open("a", encoding="utf-8") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
    if not log.stat().st_size:
        log.unlink()
