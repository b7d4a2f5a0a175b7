"""Refuses a space in which what chooses would also judge: seeds by value, problems by what they ask."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from fp4rl.lab.search.alike import require_alike
from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import merge, parse
from fp4rl.spec.space import Space
from fp4rl.spec.task import Problem, Split, Task


def require_separate(space: Space) -> None:
    """Raise InvalidValueError where a seed or a problem of the final takes part in screening or training.

    All candidates and the control have the task of the base (`require_alike`); a stage may have its own. Problems are
    compared by what they ask: two splits that read one file, or a table with the questions of another task, are the
    same problems.
    """
    if shared := {*space.screening.seeds} & {*space.final.seeds}:
        raise InvalidValueError(f"final.seeds: {sorted(shared)[0]} is screened with too; name fresh seeds")
    require_alike(space)
    task = parse(Experiment, space.base, "base").task
    judged = task.problems("test", space.final.count)
    screened = task.problems(space.screening.split, space.screening.count)
    if both := _shared(task, screened, task, judged):
        raise InvalidValueError(
            f"{len(both)} of {len(judged)} problems of the final are screened with too, such as {both[0]!r}: what "
            "chose cannot judge; take screening.split: validation, and splits that share no problem"
        )
    for where, own in _trained(space):
        for split in ("train", "validation"):
            if both := _shared(own, _learned(own, split, space), task, judged):
                raise InvalidValueError(
                    f"{where}: task: {len(both)} of {len(judged)} problems of the final are in its {split} split too, "
                    f"such as {both[0]!r}: what was trained on cannot judge; take them out of the file, or another task"
                )


def _trained(space: Space) -> Iterator[tuple[str, Task]]:
    """Yield each task that is trained on, once, with where it stands."""
    known = set()
    for where, content in [("base", {}), *((f"stages.{name}", own) for name, own in space.stages.items())]:
        task = parse(Experiment, merge(space.base, content), where).task
        if canonical(task) not in known:
            known.add(canonical(task))
            yield where, task


def _learned(task: Task, split: Split, space: Space) -> tuple[Problem, ...]:
    """Return the problems of a split; of those that a task draws for validation, as many as a search ever takes."""
    if split == "validation" and not task.files:
        with suppress(InvalidValueError):  # it has fewer: then all of them
            return task.problems(split, max(space.screening.count, space.final.count))
    return task.problems(split)


def _shared(own: Task, problems: Iterable[Problem], judging: Task, judged: Iterable[Problem]) -> list[str]:
    """Return what problems of two tasks both ask, sorted, as the one task or the other reads them."""
    pairs = [(own, problems), (judging, judged)]
    readers = {type(task): task for task, _ in pairs}.values()
    by_reader = ([{_read(reader, task, problem) for problem in held} for task, held in pairs] for reader in readers)
    return max((sorted({own for own in first & second if own}) for first, second in by_reader), key=len)


def _read(reader: Task, task: Task, problem: Problem) -> str:
    """Return the substance of a task's problem as a reader tells it; nothing where it cannot be the reader's.

    What a reader makes of another task's problem counts where it holds every digit of the question, in their order.
    """
    if type(reader) is type(task):
        return reader.substance(problem)
    question = problem.question or problem.prompt
    with suppress(Exception):  # a task of the user's own may fail in any way at what it was not written for
        substance = reader.substance(replace(problem, prompt=question, question=question))
        if re.findall(r"\d", substance) == re.findall(r"\d", question):
            return substance
    return ""
