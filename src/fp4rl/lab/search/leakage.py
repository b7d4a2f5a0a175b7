"""Refuses a space in which what chooses would also judge: seeds by value, problems by what they ask."""

from collections.abc import Iterator

from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import merge, parse
from fp4rl.spec.space import Space
from fp4rl.spec.task import Split, Task


def require_separate(space: Space) -> None:
    """Raise InvalidValueError where a seed or a problem of the final takes part in screening.

    Problems are compared by their substance, of every task that a candidate may have: two splits that read one file,
    or a split of another name with the same questions, are the same problems.
    """
    if shared := {*space.screening.seeds} & {*space.final.seeds}:
        raise InvalidValueError(f"final.seeds: {sorted(shared)[0]} is screened with too; name fresh seeds")
    tasks = list(_tasks(space))
    screened = {own for task in tasks for own in _substances(task, space.screening.split, space.screening.count)}
    judged = {own for task in tasks for own in _substances(task, "test", space.final.count)}
    if both := sorted(screened & judged):
        raise InvalidValueError(
            f"{len(both)} of {len(judged)} problems of the final are screened with too, such as {both[0]!r}: what "
            "chose cannot judge; take screening.split: validation, and splits that share no problem"
        )


def _tasks(space: Space) -> Iterator[Task]:
    """Yield each task that a candidate may have, once."""
    contents = [{}, *(choice.set for own in space.space.values() if isinstance(own, tuple) for choice in own)]
    known = set()
    for content in contents:
        if content and not any(str(key).partition(".")[0] == "task" for key in content):
            continue
        task = parse(Experiment, {"task": merge(space.base, content).get("task", {"name": "arithmetic"})}, "base").task
        if canonical(task) not in known:
            known.add(canonical(task))
            yield task


def _substances(task: Task, split: Split, count: int) -> set[str]:
    return {task.substance(problem) for problem in task.problems(split, count)}
