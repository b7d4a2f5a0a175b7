"""Several processes train one policy (torchrun): each samples and learns its share, the first alone writes and judges.

Without a launcher there is one process, it is the first, and nothing here costs anything. `accelerate` is imported
where it is used: judging a model needs none of it.
"""

from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# The others wait while the first judges; one that died is noticed by the launcher, not by a clock.
_PATIENCE = timedelta(days=1)


def _state() -> Any:
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def count() -> int:
    """Return how many processes train together."""
    return int(_state().num_processes)


def rank() -> int:
    """Return which of them this one is, from 0."""
    return int(_state().process_index)


def is_first() -> bool:
    """Return whether this is the process that writes and judges."""
    return rank() == 0


def device() -> torch.device:
    """What this process computes on: its own accelerator (the launcher's processes have one each), or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> None:
    """Until all processes have come here."""
    _state().wait_for_everyone()


def from_first(value: T) -> T:
    """Return the first process's `value`, everywhere."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    held = [value]
    broadcast_object_list(held)
    return held[0]


def from_all(value: T) -> list[T]:
    """Return every process's `value`, by rank, everywhere."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))
