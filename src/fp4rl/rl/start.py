"""The folder of the model that a run starts from; the embedded model is made here."""

from collections.abc import Callable
from pathlib import Path

from fp4rl.models.tiny import cached
from fp4rl.spec.model import Embedded, Model
from fp4rl.spec.task import Task
from fp4rl.tasks.arithmetic import Arithmetic

OnWarmUp = Callable[[int, float], None]


def start_folder(model: Model, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None) -> Path:
    """Return the folder that training starts from; the embedded model is warmed up on first use and kept in `cache`."""
    if model.path is not None:
        return Path(model.path)
    return warmed_up(model.embedded or Embedded(), task, cache, on_warm_up)


def warmed_up(embedded: Embedded, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None) -> Path:
    """Return the folder of the embedded model after its warm-up on sloppy demonstrations of arithmetic,
    whatever the run's task."""
    teacher = task if isinstance(task, Arithmetic) else Arithmetic()
    return cached(cache, embedded, teacher.demonstrations(embedded.examples_needed), on_warm_up)
