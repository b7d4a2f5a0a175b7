"""The factors of a norm, measured by its own output: its weight w, or 1 + w where the class centres it at zero."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.spec.errors import InvalidValueError


class NormGauge:
    """An FP32 copy of one norm by which the factor of every feature is measured for any weight, meta tensors included.

    `offset` is 1.0 where the layer multiplies by 1 + w and 0.0 where it multiplies by w. Raises InvalidValueError for
    a norm that does neither.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        weight: Any = module.weight
        twin: Any = copy.deepcopy(module)
        self._twin = twin.to_empty(device="cpu") if weight.is_meta else twin
        self._twin.to(torch.promote_types(weight.dtype, torch.float32)).__dict__.pop("forward", None)
        ones = torch.ones(weight.shape, dtype=self._twin.weight.dtype, device=self._twin.weight.device)
        if getattr(module, "bias", None) is not None:
            self._twin.bias = nn.Parameter(0 * ones, requires_grad=False)
        # After normalisation all its values are 1 in magnitude; a gated norm needs a gate too.
        probe = torch.where(torch.arange(ones.numel(), device=ones.device) % 2 == 0, ones, -ones)[None, None]
        gates = [ones[None, None]] if "gate" in inspect.signature(type(module).forward).parameters else []
        self._given = (probe, *gates)
        self._unit = ones
        cure = f"so that the size of its noise is not known; leave it out: noise.targets.leave: [{name}.weight]"
        try:
            at_zero = self.factors(0 * ones)
            self._unit = self.factors(ones) - at_zero
        except (TypeError, RuntimeError) as why:
            raise InvalidValueError(f"{name}: {type(module).__name__} cannot be tried alone ({why}), {cure}") from why
        offsets = at_zero / self._unit
        self.offset = float(offsets.mean().round())
        if self.offset not in (0.0, 1.0) or not torch.allclose(
            offsets, torch.full_like(offsets, self.offset), atol=1e-3
        ):
            raise InvalidValueError(
                f"{name}: {type(module).__name__} multiplies by neither its weight w nor 1 + w, {cure}"
            )

    def factors(self, weight: Tensor) -> Tensor:
        """Return the factor of each feature if the norm had this `weight`."""
        self._twin.weight = nn.Parameter(weight.to(self._unit), requires_grad=False)
        return self._read(self._twin)

    def live_factors(self, module: Any) -> Tensor:
        """Return the present factor of each feature in `module`."""
        bias = getattr(module, "bias", None)
        return self._read(module, 0.0 if bias is None else bias.detach())

    @torch.no_grad()
    def _read(self, module: Any, bias: Any = 0.0) -> Tensor:
        return (module.forward(*self._given)[0, 0] - bias) / self._unit  # type: ignore[no-any-return]
