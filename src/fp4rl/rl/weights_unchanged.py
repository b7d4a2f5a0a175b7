"""Master weights hashed before and after whatever must leave them alone (P06, P09)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fp4rl.inject.evidence import master_digest
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.modes import Phase

Record = Callable[[dict[str, Any]], None]


@contextmanager
def unharmed(model: nn.Module, phase: Phase, step: int, record: Record, **beside: str) -> Iterator[None]:
    """`record` hears whether the masters are bit for bit what they were (`beside` stands by it); else CheckFailed."""
    before = master_digest(model)
    yield
    same = master_digest(model) == before
    record({"kind": "master", "phase": phase, "step": step, **beside, "unharmed": same, "digest": before})
    if not same:
        raise CheckFailed(f"step {step}: the master weights are not the same after {phase} as before it")
