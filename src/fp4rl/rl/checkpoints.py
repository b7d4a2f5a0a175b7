"""Checkpoints at rollout boundaries: the trainer's own files, and beside them one of fp4rl, written last.

A checkpoint without that file is incomplete; one whose files are not as it lists them is damaged. Either way the one
before it is used.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any

from fp4rl.rl.durable import sync, sync_all

STATE = "fp4rl.json"
EVERY_S = 300.0
_SHARE = 20  # writing checkpoints may take 1/20 of the time, however large they are
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the steps done, and the state besides model and optimizer."""

    path: Path
    step: int
    state: Mapping[str, Any]


def complete(folder: Path, step: int, stamp: str, state: Mapping[str, Any]) -> None:
    """Complete the trainer's checkpoint in `folder`, which is durable before it counts as complete. `stamp` names the
    code that may resume from it."""
    sync_all(folder)
    written = json.dumps({"stamp": stamp, "step": step, "state": state, "files": _fingerprints(folder)})
    content = json.loads(written)  # as it will be read
    content["sum"] = _sum(content)
    unfinished = folder / f".{STATE}.partial"
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / STATE)
    for holder in (folder, folder.parent, folder.parent.parent):
        sync(holder)


def newest(folder: Path, stamp: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint in `folder` that is complete, undamaged and of this code; `say` gets why not."""
    for path in _by_age(folder):
        checkpoint, why = read(path, stamp)
        if checkpoint is not None:
            return checkpoint
        say(f"checkpoint {path.name} is left out: {why}")
    return None


def all_of(folder: Path, stamp: str | None = None) -> dict[int, Path]:
    """Return steps done -> folder, for every complete checkpoint; with `stamp` only for those of that code."""
    by_step = {}
    for path in _by_age(folder):
        with suppress(*_UNREADABLE):  # `newest` leaves out the same ones and says why
            content = json.loads((path / STATE).read_text(encoding="utf-8"))
            if stamp in (None, content["stamp"]):
                by_step[int(content["step"])] = path
    return by_step


def rotate(folder: Path, every: int, keep: int) -> None:
    """Delete checkpoints that are no longer needed. The newest two stay, in case one is damaged, and the newest `keep`
    at multiples of `every` steps (0: none), for rollbacks. An incomplete one stays until a newer one is complete."""
    complete = all_of(folder)
    regular = [step for step in sorted(complete) if every and step % every == 0]
    staying = {complete[step] for step in (*sorted(complete)[-2:], *regular[-keep:])}
    older = dropwhile(lambda path: path not in staying, _by_age(folder))
    remove([path for path in older if path not in staying])


def remove(paths: list[Path]) -> None:
    """Delete checkpoints; fp4rl's file first, so that a half-deleted one counts as incomplete."""
    for path in paths:
        (path / STATE).unlink(missing_ok=True)
        shutil.rmtree(path)


def _by_age(folder: Path) -> list[Path]:
    """Return the checkpoint folders, the newest first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=lambda path: -int(path.name.rpartition("-")[2]))


def read(path: Path, stamp: str) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint in `path`, or None and why a run cannot resume from it."""
    if not (path / STATE).is_file():
        return None, "it was not written to its end"
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if content["stamp"] != stamp:
            return None, "other code wrote it"
        if content.pop("sum") != _sum(content):
            return None, f"its {STATE} is damaged"
        damaged = next((name for name, seen in _fingerprints(path).items() if content["files"].get(name) != seen), None)
        missing = next((name for name in content["files"] if not (path / name).is_file()), None)
        if damaged or missing:
            return None, f"its file {damaged or missing} is {'damaged' if damaged else 'missing'}"
        return Checkpoint(path, int(content["step"]), content["state"]), ""
    except _UNREADABLE as error:
        return None, f"its {STATE} cannot be read ({error})"


def _sum(content: Mapping[str, Any]) -> str:
    """Return a checksum of the rest of fp4rl's file, which may be damaged and still be readable."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _fingerprints(folder: Path) -> dict[str, str]:
    fingerprints = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith((STATE, ".partial")):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16))
            fingerprints[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return fingerprints


class SaveClock:
    """Decides when the next checkpoint against interruptions is due, by the time since the last and its cost."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = self._begun = now()
        self._took = 0.0

    def due(self, *, last: bool) -> bool:
        """Return whether it is due. Sooner at the `last` step: the final evaluation has no step to save at."""
        wait = max(EVERY_S, _SHARE * self._took)
        return self._now() - self._last >= (wait / 10 if last else wait)

    def begin(self) -> None:
        """Note that writing a checkpoint begins."""
        self._begun = self._now()

    def end(self) -> None:
        """Note that the checkpoint is written."""
        self._last = self._now()
        self._took = self._last - self._begun
