"""All tasks: one line each. Their classes are one floor up, without torch, and are imported by name."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from fp4rl.spec.task import Task

HOMES = (
    "fp4rl.tasks.arithmetic.Arithmetic",
    "fp4rl.tasks.gsm8k.Gsm8k",
    "fp4rl.tasks.table.Table",
)


def _task_class(home: str) -> type[Task]:
    module, _, name = home.rpartition(".")
    cls = getattr(import_module(module), name)
    if missing := sorted(cls.__abstractmethods__):
        raise TypeError(f"{home} does not implement {', '.join(missing)}, which every task needs")
    return cls  # type: ignore[no-any-return]


_CLASSES = tuple(_task_class(home) for home in HOMES)
TASKS: Mapping[str, type[Task]] = {task.model_fields["name"].default: task for task in _CLASSES}

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[Union[_CLASSES], Field(discriminator="name")]  # noqa: UP007 - the members are a tuple
