"""What makes fake steps take less time and changes none of their numbers."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def imports_kept() -> Iterator[None]:
    """Leave what is imported by now out of collections of garbage: Accelerate collects at each end of a training."""
    if gc.get_freeze_count():  # whoever did it knows until when
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Leave the other half to the process beside this one: threads that share a core mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
