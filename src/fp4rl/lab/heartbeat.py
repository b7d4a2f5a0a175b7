"""A run's sign of life: who works on it, what it is at, since when nothing has moved, and how the last attempt ended.

The record is written in place and has always the same size, so that it can be written on a full disk too. Whether the
process still lives is never read from it: on its own machine the run's lock decides, on another the record's age.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Literal

from fp4rl.rl.events import Event, Interrupted, Progress, StepDone
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.words import counted

LOCK = ".lock"
EVERY_S = 5.0
GRACE_S = 120.0  # without a sign of life for so long, a run of another machine is taken to be dead
_FILE = "heartbeat.json"
_SIZE = 4096
_LONGEST = 2000  # characters of a reason

Ending = Literal["interrupted", "failed", "lost", "done"]


@dataclass(frozen=True)
class Beat:
    """One record. Times are seconds since 1970: `at` of this sign of life, `progress_at` of the last progress."""

    host: str
    pid: int
    began: float
    at: float
    progress_at: float
    stage: str = ""
    done: int = 0
    total: int = 0
    ended: Ending | None = None
    why: str = ""

    @property
    def where(self) -> str:
        """Where the run is: `step 12 of 30 of training`, `warm-up`."""
        if not self.stage:
            return "its start"
        if not self.total:
            return self.stage
        return f"{'step ' if self.stage == 'training' else ''}{self.done} of {self.total} of {self.stage}"


class Heartbeat:
    """Writes the record of a run while its process lives, every few seconds and from a thread of its own."""

    def __init__(self, folder: Path, steps: int, every_s: float = EVERY_S) -> None:
        """Begin; `steps` is how many are to be trained."""
        self._path, self._steps, self._every_s = folder / _FILE, steps, every_s
        began = time.time()
        self._beat = Beat(socket.gethostname(), os.getpid(), began, began, began)
        self._lock, self._over, self._taken = threading.Lock(), threading.Event(), False
        _write(self._path, self._beat)
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def note(self, event: Event) -> None:
        """Note the progress of an event. Raises CheckFailed where another process has taken the run over."""
        match event:
            case Progress(stage, done, total):
                self._move(stage or self._beat.stage, done, total)
            case StepDone(step):
                self._move("training", step, self._steps)
        if self._taken:
            other = read(self._path.parent)
            by = f" ({other.host}, process {other.pid})" if other is not None else ""
            raise CheckFailed(f"another process{by} has taken this run over: no sign of this one had reached the disk")

    def _move(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            self._beat = replace(self._beat, stage=stage, done=done, total=total, progress_at=time.time())

    def end(self, ended: Ending, why: str) -> None:
        """Write how the attempt ended, and stop."""
        self._over.set()
        self._thread.join()
        if not self._taken:
            now = time.time()
            with suppress(OSError):
                _write(self._path, replace(self._beat, at=now, ended=ended, why=why[:_LONGEST]))

    def _go_on(self) -> None:
        while not self._over.wait(self._every_s):
            other = read(self._path.parent)
            if other is not None and (other.host, other.pid, other.began) != self._own:
                self._taken = True
                return
            with self._lock:
                self._beat = replace(self._beat, at=time.time())
                beat = self._beat
            with suppress(OSError):
                _write(self._path, beat)

    @property
    def _own(self) -> tuple[str, int, float]:
        return self._beat.host, self._beat.pid, self._beat.began


@contextmanager
def beating(folder: Path, steps: int) -> Iterator[Heartbeat]:
    """Keep the sign of life of the run in `folder`, which is to train `steps`, and how it ended."""
    heart = Heartbeat(folder, steps)
    try:
        yield heart
    except BaseException as error:
        requested = isinstance(error, Interrupted | KeyboardInterrupt)
        heart.end("interrupted" if requested else "failed", str(error) or type(error).__name__)
        raise
    heart.end("done", "")


def read(folder: Path) -> Beat | None:
    """Return the record; None where there is none, or none that can be read."""
    for _ in range(2):  # the first may have met a write
        with suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
    return None


def note_end(folder: Path, ended: Ending, why: str) -> None:
    """Write how an attempt ended whose process could not write it; nothing where it had left no record."""
    beat = read(folder)
    if beat is not None:
        with suppress(OSError):
            _write(folder / _FILE, replace(beat, ended=ended, why=why[:_LONGEST]))


def alive(folder: Path, beat: Beat) -> bool:
    """Return whether the process of a record lives: by the run's lock on its own machine, elsewhere by its age.

    Nothing is written, and others may ask at the same time.
    """
    if beat.host == socket.gethostname():
        try:
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:  # a disk without locks
            pass
    return beat.ended is None and time.time() - (folder / _FILE).stat().st_mtime < GRACE_S


def age_of(folder: Path) -> float:
    """Return how long ago the record was written, by the disk's own clock where one may write there: who begins a run
    may not err by a clock that is set wrong."""
    written = (folder / _FILE).stat().st_mtime
    with suppress(OSError), NamedTemporaryFile(dir=folder, prefix=".clock") as clock:
        clock.write(b".")
        clock.flush()
        return os.fstat(clock.fileno()).st_mtime - written
    return time.time() - written


def of_another_machine(folder: Path) -> str | None:
    """Return why a run must not be started here: a process of another machine has shown signs of life."""
    beat = read(folder)
    if beat is None or beat.ended is not None or beat.host == socket.gethostname() or (age := age_of(folder)) > GRACE_S:
        return None
    wait = counted(round(GRACE_S - age) + 1, "second")
    return f"{beat.host} is at {beat.where}, {age:.0f} s ago; if it has died, try again in {wait}"


def _write(path: Path, beat: Beat) -> None:
    text = json.dumps(asdict(beat), ensure_ascii=False).encode()
    if len(text) > _SIZE:  # a reason in a script of several bytes a character
        text = json.dumps(asdict(replace(beat, why=beat.why[: _LONGEST // 4], stage=beat.stage[:80]))).encode()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
        file.write(text.ljust(_SIZE))
