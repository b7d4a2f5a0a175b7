"""A process beside this one with a pipe to it, which Ctrl-C in the terminal does not interrupt while it starts."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any


def spawned(target: Callable[..., None], *words: Any) -> tuple[SpawnProcess, Connection]:
    """Start `target(pipe, parent, *words)` in a new Python, and return the process and this end of the pipe.

    Ctrl-C goes to the whole process group. It is blocked while a child starts, so that no child prints a traceback of
    its imports; `target` says what to do with it, and unblocks it. `parent` is this process, for `deaths.die_with`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, os.getpid(), *words), daemon=True)
    resource_tracker.ensure_running()  # before blocking, since starting it unblocks the signal
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    theirs.close()
    return process, ours
