"""The one FP32 factor of NVFP4 weights that a serving kernel fuses into one matrix: q/k/v, gate/up.

A checkpoint stores a divisor for each of them, 448 * 6 / amax, and vLLM applies the largest divisor to all, which is
right for equal ones alone. So packers store in all of them the least divisor, that of the group's largest magnitude
(llm-compressor, ModelOpt): it is that of the fused matrix as one tensor.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fp4rl.spec.errors import InvalidValueError

KEY = "injected"  # where a module holds its state


class FusedGroup:
    """The injected layers of one group. Each rounds its own weight, under the factor of all present ones."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    @torch.no_grad()
    def largest(self) -> Tensor:
        """Return the largest magnitude of all present weights, []."""
        return torch.stack([self._largest_of(module) for module in self.modules]).amax()

    def _largest_of(self, module: Any) -> Tensor:
        weight = getattr(module, KEY).master(module).detach()
        if not weight.numel():
            raise InvalidValueError(
                "FSDP1 holds the layers of a fused group apart, so that they have no common factor; wrap whole blocks"
            )
        if hasattr(weight, "full_tensor"):  # FSDP2 may shard another layer of the group
            return weight.abs().amax().full_tensor().float()  # type: ignore[no-any-return]
        return torch.stack(weight.aminmax()).abs().amax().float()  # a third of the time of `abs` over all

    def others(self, state: object) -> Iterator[Any]:
        """Yield (state, module) of all layers but the one of `state`."""
        for module in self.modules:
            if (other := getattr(module, KEY)) is not state:
                yield other, module


def with_largest(weight: Tensor, largest: Tensor) -> Tensor:
    """Return a matrix with one more row, which carries the largest magnitude of the group: one factor serves both."""
    row = pad(largest.to(weight.dtype).view(1, 1), (0, weight.shape[-1] - 1))
    return torch.cat([weight, row])
