"""Master weights hashed before and after whatever must leave them alone (P06, P09)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from fp4rl.inject.evidence import master_digest
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import Evidence, MasterCheck
from fp4rl.spec.modes import Phase

Record = Callable[[Evidence], None]


@contextmanager
def unharmed(model: nn.Module, phase: Phase, step: int, record: Record, profile: str | None = None) -> Iterator[None]:
    """`record` hears whether the masters are bit for bit what they were; if not, CheckFailed."""
    before = master_digest(model)
    yield
    same = master_digest(model) == before
    line = MasterCheck(phase=phase, step=step, unchanged=same, digest=before)
    record(line if profile is None else line.extended(profile=profile))
    if not same:
        raise CheckFailed(f"step {step}: the master weights are not the same after {phase} as before it")
