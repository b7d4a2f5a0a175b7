"""Guards around a run: its lock, a one-line error for a full disk, and a log of crashes below Python."""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fp4rl.lab.files import is_full, unwritable_named
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.heartbeat import LOCK, of_another_machine
from fp4rl.lab.resuming import what_follows
from fp4rl.rl.events import Interrupted
from fp4rl.spec.errors import CheckFailed, InvalidValueError, UserError
from fp4rl.spec.evidence import Failed

# How faulthandler begins its report of a segmentation fault.
FATAL = "Fatal Python error"
_PATIENCE_S = 20.0  # a worker whose parent was killed takes a moment to notice


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run's lock, which the system releases when the process dies. Raises InvalidValueError if it is held, or
    if a process of another machine, whose lock may not be seen through a shared disk, has shown signs of life."""
    lock = FileLock(folder.path / LOCK, timeout=_PATIENCE_S, poll_interval=0.2)
    with unwritable_named(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise InvalidValueError(f"{folder.key} is being run by another process; wait for it to end") from None
    try:
        if (why := of_another_machine(folder.path)) is not None:
            raise InvalidValueError(f"{folder.key} is being run by another machine: {why}")
        yield
    finally:
        lock.release()


@contextmanager
def full_disk_named(folder: RunFolder) -> Iterator[None]:
    """Raise CheckFailed with one line for a full disk, whatever a library raised for it."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        cure = f"make room and run the same command again, which {what_follows(folder.path)}"
        raise CheckFailed(f"the disk of {folder.path} is full; {cure}") from None


@contextmanager
def failure_kept(folder: RunFolder) -> Iterator[None]:
    """Keep as evidence why the run failed; one that was asked to end, or that a user's mistake ended, did not."""
    try:
        yield
    except (Interrupted, UserError):
        raise
    except Exception as error:
        with suppress(OSError):
            folder.add_evidence(Failed(why=str(error) or type(error).__name__))
        raise


@contextmanager
def crashes_logged(log: Path) -> Iterator[None]:
    """Append the stacks of all threads to `log` at a segmentation fault, an abort or a bus error."""
    if faulthandler.is_enabled():  # the user writes them elsewhere
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
