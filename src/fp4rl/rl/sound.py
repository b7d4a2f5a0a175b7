"""The quantizer's self-test on the device that a run computes on: 0.02 s on a CPU, before anything is trained."""

import torch
from torch import Tensor

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.selftest import require_sound
from fp4rl.rl import processes
from fp4rl.spec.formats import Format


def require_sound_here() -> None:
    """CheckFailed when the backend that this process rounds with is broken (P14)."""
    device = processes.device()

    def there(x: Tensor, fmt: Format, generator: torch.Generator) -> Tensor:
        # What is drawn comes from the test's own generator, which belongs to the CPU.
        where = torch.device("cpu") if fmt.rounding == "stochastic" else device
        return fake_quantize(x.to(where), fmt, generator=generator if where.type == "cpu" else None).cpu()

    require_sound(there)
