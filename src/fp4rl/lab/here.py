"""The files that a run needs and this machine lacks, found out without loading anything."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.task import Gsm8k


def not_here(runs: Iterable[PlannedRun]) -> list[str]:
    """One line for each path that the runs name and that does not exist."""
    return list(dict.fromkeys(line for run in runs for line in _not_here(run)))


def _not_here(run: PlannedRun) -> Iterator[str]:
    task, model = run.experiment.task, run.experiment.model
    named = [("model.path", model.path)]
    if isinstance(task, Gsm8k):
        named += [("task.path", task.path), ("task.test_path", task.test_path)]
    for key, path in named:
        if path is not None and not Path(path).exists():
            yield f"{key}: {path} does not exist on this machine"
