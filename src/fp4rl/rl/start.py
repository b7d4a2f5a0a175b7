"""Where a run starts: its task, and the folder of the model it trains (made here when it is the embedded one)."""

from collections.abc import Callable
from pathlib import Path

from fp4rl.models.tiny import cached
from fp4rl.spec import task as task_spec
from fp4rl.spec.model import Embedded, Model
from fp4rl.tasks.arithmetic import Arithmetic
from fp4rl.tasks.gsm8k import Gsm8k
from fp4rl.tasks.task import Problem, Task

OnWarmUp = Callable[[int, float], None]


def task_of(spec: task_spec.Task) -> Task:
    """The task that a spec describes. Raises NotFoundError when a file it names does not exist."""
    match spec:
        case task_spec.Arithmetic():
            return Arithmetic(seed=spec.seed, difficulty=spec.difficulty)
        case task_spec.Gsm8k():
            test_path = Path(spec.test_path) if spec.test_path else None
            return Gsm8k(path=Path(spec.path), test_path=test_path, prompt=spec.prompt)


def training_problems(spec: task_spec.Task, task: Task) -> tuple[Problem, ...]:
    """The training split: as many problems as the spec asks for, or all there are."""
    return task.problems("train", spec.train_count if isinstance(spec, task_spec.Arithmetic) else None)


def start_folder(model: Model, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None) -> Path:
    """The folder that training starts from; the embedded model is warmed up on first use and kept in `cache`."""
    if model.path is not None:
        return Path(model.path)
    return warmed_up(model.embedded or Embedded(), task, cache, on_warm_up)


def warmed_up(embedded: Embedded, task: Task, cache: Path, on_warm_up: OnWarmUp | None = None) -> Path:
    """The embedded model after its warm-up on sloppy demonstrations of the arithmetic task, whatever the run's task."""
    teacher = task if isinstance(task, Arithmetic) else Arithmetic()
    return cached(cache, embedded, teacher.demonstrations(embedded.examples_needed), on_warm_up)
