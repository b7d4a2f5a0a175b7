"""Several processes train one policy (torchrun): each samples and trains its share, the first writes and evaluates.

Without a launcher there is one process, the first, and nothing here costs anything. `accelerate` is imported where it
is used: evaluating a model does not need it.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from fp4rl.numerics.device import accelerator
from fp4rl.spec.errors import NotFinite

T = TypeVar("T")

# The others wait while the first evaluates; a process that died is noticed by the launcher, not by a timeout.
_PATIENCE = timedelta(days=1)


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=accelerator() is None, timeout=_PATIENCE)


def count() -> int:
    """Return the number of processes that train together."""
    return int(_state().num_processes)


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(_state().process_index)


def is_first() -> bool:
    """Return whether this is the process that writes and evaluates."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its own accelerator (under a launcher, one for each process), or the CPU."""
    kind = accelerator()
    return torch.device("cpu") if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def wait() -> None:
    """Wait until all processes have called this."""
    _state().wait_for_everyone()


def from_first(value: T) -> T:
    """Return the first process's `value` in all processes."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    held = [value]
    broadcast_object_list(held)
    return held[0]


def agreed(work: Callable[[], T]) -> T:
    """Return what `work` gives in this process; raise NotFinite in all processes where it does in one of them.

    The others would wait for ever for one that goes back to a checkpoint. Within `work` no process may wait for others.
    """
    made: list[T] = []
    try:
        made.append(work())
        failure = None
    except NotFinite as error:
        failure = str(error)
    for number, why in enumerate(from_all(failure)):
        if why is not None:
            raise NotFinite(why if number == rank() else f"process {number}: {why}") from None
    return made[0]


def from_all(value: T) -> list[T]:
    """Return the values of all processes, by rank, in all processes."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))
