"""Find problems that two sets share in substance, whatever their wording."""

from collections.abc import Sequence

from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.task import Problem, Task


def overlap(task: Task, left: Sequence[Problem], right: Sequence[Problem]) -> tuple[str, ...]:
    """Return the substances that occur in both, sorted: operation sequences, or normalised questions."""
    return tuple(sorted({task.substance(p) for p in left} & {task.substance(p) for p in right}))


def check_disjoint(task: Task, train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """Raise CheckFailed, with an example, when a held-out problem is trained on in substance."""
    shared = overlap(task, train, held_out)
    if shared:
        raise CheckFailed(
            f"{len(shared)} of {len(held_out)} held-out problems of {task.name} are also trained on, "
            f"such as {shared[0]!r}; cut the splits by substance"
        )
