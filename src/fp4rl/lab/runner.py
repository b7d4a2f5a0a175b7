"""Run what is planned and not finished, with an executor that the caller chooses."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.files import unwritable_named, write_whole
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.provenance import changed_inputs, code_digest, recorded_result
from fp4rl.rl import events
from fp4rl.spec.errors import NotFoundError

STOPPING = "stopping"  # the stage of the event that all runs will end after their present step


@dataclass(frozen=True)
class Event:
    """The progress of a run: its stage and how far it is, the metrics of a step, or a `line` for the user."""

    run_id: str
    stage: str
    done: int
    total: int
    metrics: dict[str, float] | None = None
    line: str | None = None

    @classmethod
    def of(cls, run: PlannedRun, event: events.Event) -> "Event | None":
        """Return an event of one run for display; None for one that only its folder keeps."""
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
    """How one run ended: `error` None or one line; `mistake`: it is the user's; `interrupted`: it was asked to end."""

    run: PlannedRun
    error: str | None = None
    mistake: bool = False
    interrupted: bool = False


OnEvent = Callable[[Event], None]


# Runs what is given below a folder, calls back with progress, and yields outcomes as they come, in any order.
Executor = Callable[[Sequence[PlannedRun], Path, OnEvent], Generator[Outcome, None, None]]


@dataclass
class SuiteOutcome:
    """The outcomes of the runs of a suite."""

    skipped: list[PlannedRun] = field(default_factory=list)
    done: list[PlannedRun] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)


def split_finished(runs: Sequence[PlannedRun], root: Path) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """Split runs into (finished, still to do), each in the given order."""
    finished = [run for run in runs if run_folder(root, run.suite, run.run_id).finished]
    return finished, [run for run in runs if run not in finished]


def stale(runs: Sequence[PlannedRun], root: Path) -> list[PlannedRun]:
    """Return the finished runs that were made with other code or files than the present, or that cannot be read."""
    finished, _ = split_finished(runs, root)
    changed = changed_inputs(finished, root)
    old = {run.run_id for run in finished if run.run_id in changed or _code_of(run, root) != code_digest()}
    while more := {run.run_id for run in finished if not old.isdisjoint(run.needs.values())} - old:
        old |= more  # what starts from a run that is to be repeated is repeated too
    return [run for run in finished if run.run_id in old]


def _code_of(run: PlannedRun, root: Path) -> str:
    result = recorded_result(run, root)
    return (result.code_digest if result is not None else None) or "unknown"


def run_all(
    runs: Sequence[PlannedRun], root: Path, executor: Executor, on_event: OnEvent, on_outcome: Callable[[Outcome], None]
) -> SuiteOutcome:
    """Run all that are not finished. A failed run does not stop the others."""
    finished, missing = split_finished(runs, root)
    outcome = SuiteOutcome(skipped=finished)
    if not missing:
        return outcome
    # Closed at once on an exception here, so that the executor ends its workers.
    with closing(executor(missing, root, on_event)) as outcomes:
        for ended in outcomes:
            if ended.error is None:
                outcome.done.append(ended.run)
            else:
                outcome.failed.append(ended)
            on_outcome(ended)
    return outcome


def require_trl() -> None:
    """Raise NotFoundError, naming the extra, where TRL is not installed: beside verl it cannot be."""
    if find_spec("trl") is None:
        raise NotFoundError("training needs TRL, the extra `train`: pip install 'fp4rl[train]'")


def keep_suite(root: Path, suite: str, content: Mapping[str, Any]) -> None:
    """Write the suite's description beside its runs, for the report and for other readers of the folder."""
    with unwritable_named(root / suite):
        write_whole(root / suite / "suite.yaml", yaml.safe_dump(dict(content), sort_keys=False))


def archive_stale(runs: Sequence[PlannedRun], root: Path) -> None:
    """Move finished runs to `<suite>/stale/`, so that they can be repeated without overwriting a result."""
    for run in runs:
        archive = root / run.suite / "stale" / f"{run.run_id}-{_code_of(run, root)}"
        archive.parent.mkdir(exist_ok=True)
        run_folder(root, run.suite, run.run_id).path.rename(archive)
