"""Carry out planned runs that are not finished, through an executor that is handed down."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.files import unwritable_named, write_whole
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.provenance import changed_inputs, code_digest, recorded_result
from fp4rl.rl import events

STOPPING = "stopping"  # the stage of an event that says: all runs will end after the step they are in


@dataclass(frozen=True)
class Event:
    """What a run is doing: the stage and how far it is, the metrics of a step that is done, or a `line` to be heard."""

    run_id: str
    stage: str
    done: int
    total: int
    metrics: dict[str, float] | None = None
    line: str | None = None

    @classmethod
    def of(cls, run: PlannedRun, event: events.Event) -> "Event | None":
        """Return the event of one run as a screen shows it; None for what only its folder keeps."""
        match event:
            case events.Progress(stage, done, total):
                return cls(run.run_id, stage, done, total)
            case events.StepDone(step, metrics):
                return cls(run.run_id, "training", step, run.experiment.training.steps, metrics)
            case events.Message(line):
                return cls(run.run_id, "", 0, 0, None, line)
        return None


@dataclass(frozen=True)
class Outcome:
    """How one run ended: `error` is None, or one line that says what went wrong; `mistake` if it is the user's,
    `interrupted` if somebody asked it to end."""

    run: PlannedRun
    error: str | None = None
    mistake: bool = False
    interrupted: bool = False


OnEvent = Callable[[Event], None]


# Carries out runs below a folder, tells how they go, and yields outcomes as they come, in any order.
Executor = Callable[[Sequence[PlannedRun], Path, OnEvent], Generator[Outcome, None, None]]


@dataclass
class SuiteOutcome:
    """What happened to the runs of a suite."""

    skipped: list[PlannedRun] = field(default_factory=list)
    done: list[PlannedRun] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)


def split_finished(runs: Sequence[PlannedRun], root: Path) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """(finished, still to do), each in the order given."""
    finished = [run for run in runs if run_folder(root, run.suite, run.run_id).finished]
    return finished, [run for run in runs if run not in finished]


def stale(runs: Sequence[PlannedRun], root: Path) -> list[PlannedRun]:
    """Return the finished runs that other code or other files than those of now computed, or that cannot be read."""
    finished, _ = split_finished(runs, root)
    changed = changed_inputs(finished, root)
    return [run for run in finished if run.run_id in changed or _code_of(run, root) != code_digest()]


def _code_of(run: PlannedRun, root: Path) -> str:
    result = recorded_result(run, root)
    return (result.code_digest if result is not None else None) or "unknown"


def run_all(
    runs: Sequence[PlannedRun], root: Path, executor: Executor, on_event: OnEvent, on_outcome: Callable[[Outcome], None]
) -> SuiteOutcome:
    """Carry out the runs that are not finished. A failed run does not stop the others."""
    finished, missing = split_finished(runs, root)
    outcome = SuiteOutcome(skipped=finished)
    if not missing:
        return outcome
    # Closed at once on an exception here: the executor's own clean-up ends its workers.
    with closing(executor(missing, root, on_event)) as outcomes:
        for ended in outcomes:
            if ended.error is None:
                outcome.done.append(ended.run)
            else:
                outcome.failed.append(ended)
            on_outcome(ended)
    return outcome


def keep_suite(root: Path, suite: str, content: Mapping[str, Any]) -> None:
    """Write the suite's own description beside its runs, for the report and for whoever reads the folder."""
    with unwritable_named(root / suite):
        write_whole(root / suite / "suite.yaml", yaml.safe_dump(dict(content), sort_keys=False))


def archive_stale(runs: Sequence[PlannedRun], root: Path) -> None:
    """Move finished runs to `<suite>/stale/`, so that they can be repeated; nothing finished is ever overwritten."""
    for run in runs:
        archive = root / run.suite / "stale" / f"{run.run_id}-{_code_of(run, root)}"
        archive.parent.mkdir(exist_ok=True)
        run_folder(root, run.suite, run.run_id).path.rename(archive)
