"""What has become of a planned run, derived whenever it is read: a killed process leaves nothing that runs."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from fp4rl.lab import heartbeat
from fp4rl.lab.files import Damaged
from fp4rl.lab.folders import RunFolder, all_runs
from fp4rl.lab.heartbeat import Beat
from fp4rl.lab.resuming import what_follows
from fp4rl.lab.runs import Run
from fp4rl.spec.errors import UserError

# done: with its evidence. stopped: ended early by a rule. interrupted: asked to end, goes on by the same command. lost:
# its process died without a word. invalid: without the evidence that its spec asks for. damaged: cannot be read.
Word = Literal["running", "failed", "lost", "invalid", "damaged", "interrupted", "stopped", "done", "planned"]
WORDS: tuple[Word, ...] = get_args(Word)  # in the order in which they are told
_SILENT_S = 120.0  # without progress for so long, a running run's reason says since when


@dataclass(frozen=True)
class Status:
    """The status of a run, why it has it, and since when (seconds since 1970; None where nothing recorded it)."""

    word: Word
    why: str = ""
    at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has a result, of whatever worth."""
        return self.word in ("done", "stopped", "invalid", "damaged")

    @property
    def since(self) -> str:
        """The time in this machine's own time zone; empty where it is not known."""
        return "" if self.at is None else f"{datetime.fromtimestamp(self.at):%Y-%m-%d %H:%M}"

    def as_dict(self) -> dict[str, str | None]:
        """Return plain values, the time in UTC."""
        at = None if self.at is None else datetime.fromtimestamp(self.at, UTC).isoformat(timespec="seconds")
        return {"status": self.word, "why": self.why or None, "at": at}


def status_of(folder: RunFolder, run: Run | Damaged | None) -> Status:
    """Return the status of a run; `run` is what could be read of its result, None where it has none."""
    if run is None:
        return _unfinished(folder) if folder.path.is_dir() else Status("planned")
    at = (folder.path / "result.json").stat().st_mtime
    if isinstance(run, Damaged):
        return Status("damaged", str(run), at)
    return judged(run, at)


def judged(run: Run, at: float | None = None) -> Status:
    """Return the status of a finished run, by its evidence and how it ended."""
    if run.gaps:
        return Status("invalid", "; ".join(run.gaps), at)
    if run.result.stopped:
        return Status("stopped", run.result.stopped, at)
    return Status("done", "", at)


def unfinished(root: Path) -> dict[RunFolder, Status]:
    """Return the runs below `root` that were begun and have no result, with what has become of them."""
    return {folder: status_of(folder, None) for folder in all_runs(root) if not folder.finished}


def _unfinished(folder: RunFolder) -> Status:
    beat = heartbeat.read(folder.path)
    if beat is not None and heartbeat.alive(folder.path, beat):
        return Status("running", _under_way(beat), beat.progress_at)
    failure = folder.failure
    if beat is None:
        written = folder.path.stat().st_mtime
        return Status("failed", failure, written) if failure else Status("lost", "it left no sign of life", written)
    if beat.ended in ("failed", "interrupted", "lost"):
        return Status(beat.ended, beat.why, beat.at)
    if failure:
        return Status("failed", failure, beat.at)
    where = _caught_up(folder, beat).where
    why = f"its process on {beat.host} died at {where}; the same command {what_follows(folder.path)}"
    return Status("lost", why, beat.at)


def _caught_up(folder: RunFolder, beat: Beat) -> Beat:
    """Return the record with the steps that were done after it: a killed process wrote it up to some seconds before."""
    with suppress(OSError, UserError, KeyError, TypeError, ValueError):
        step = max(folder.metrics(), default=0)
        if beat.stage == "training":
            return replace(beat, done=max(step, beat.done))
        if step and (folder.path / "metrics.jsonl").stat().st_mtime > beat.progress_at:
            return replace(beat, stage="training", done=step, total=int(folder.spec()["training"]["steps"]))
    return beat


def _under_way(beat: Beat) -> str:
    still = time.time() - beat.progress_at
    silent = f", nothing since {still / 60:.0f} minutes" if still > _SILENT_S else ""
    return f"at {beat.where}{silent}"
