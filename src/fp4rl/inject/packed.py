"""A live linear layer whose frozen weight exists only as 4-bit codes and scales, 4.25 bits a weight in MXFP4."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4rl.inject.cache import SharedInput
from fp4rl.inject.linear import InjectedLinear, LinearState
from fp4rl.inject.matmul import linear_with_errors
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.site import KEY
from fp4rl.numerics.packing import Packed, dequantize, pack_tensor
from fp4rl.spec.injection import Injection


class PackedState(LinearState):
    """The state of a layer with a packed weight: `take` packs the weight, `give_back` puts the rounded one back."""

    def __init__(self, plan: SitePlan, injection: Injection, shared: SharedInput) -> None:
        super().__init__(plan, injection, shared)
        self.packed: Packed | None = None
        self.master_dtype = self.dtype
        self._before = self._after = torch.empty(0)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.plan.name}: a packed layer cannot be copied; remove the injection, or take copy")

    def take(self, layer: nn.Linear) -> None:
        """Pack the layer's weight, and put a meta tensor (a shape without memory) in its place."""
        weight = layer.weight.detach()
        assert self.plan.weight is not None
        self.master_dtype = weight.dtype
        self.packed = pack_tensor(weight.to(self.dtype), self.plan.weight, name=self.plan.name)
        stride = max(1, weight.numel() // 4096)
        self._before = weight.reshape(-1)[::stride].clone()
        self._after = self.values().reshape(-1)[::stride].clone()
        self._put(layer, torch.empty_like(weight, device="meta"))

    def give_back(self, layer: nn.Linear) -> None:
        """Put the rounded weight into the layer."""
        self._put(layer, self.values())

    def values(self) -> Tensor:
        """Return the rounded weight [out, in] in the dtype that the master had; unpacked now and not kept."""
        assert self.packed is not None
        return dequantize(self.packed).to(self.master_dtype)

    def move(self, device: torch.device) -> None:
        """Move codes and scales to another device."""
        packed = self.packed
        assert packed is not None
        factor = None if packed.factor is None else packed.factor.to(device)
        shifted = packed.data.to(device), packed.scales.to(device), factor
        self.packed = Packed(*shifted, packed.levels, packed.columns)

    def would_change(self, point: str, x: Tensor) -> bool:
        """Return False for the weight: codes hold rounded values only, so one that did not change was on the grid."""
        return point != "weight" and super().would_change(point, x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Compute like `LinearState`; the weight is unpacked in forward and backward, and kept only for errors."""
        self.calls += 1
        self.note("weight", self._before, self._after, 0)
        if self.input_on:
            x = self.rounded_input(x)
        if self.products_on:
            y = linear_with_errors(x, self.values(), layer.bias, self)
        else:
            y = _UnpackedTwice.apply(x, layer.bias, self)  # type: ignore[no-untyped-call]
        return self.rounded_values(y, "output") if self.output_on else y

    def _put(self, layer: nn.Linear, weight: Tensor) -> None:
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


class _UnpackedTwice(torch.autograd.Function):
    """Computes x Q(W)^T + b and saves neither x (a frozen weight has no gradient) nor the unpacked weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, state: PackedState) -> Tensor:
        ctx.state = state
        return linear(x, state.values().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0]
        grad_x = g @ ctx.state.values().to(g.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class PackedLinear(InjectedLinear):
    """`InjectedLinear` over codes. Its state dict holds the rounded weight; loading a weight packs it."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._state.values()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        self._state.give_back(self)  # loading needs a tensor to load into
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._state.take(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        placeholder = self._parameters.pop("weight")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters["weight"] = placeholder
        self._state.move(fn(torch.empty(0, dtype=torch.uint8, device=self._state.values().device)).device)
        return self

    @property
    def _state(self) -> PackedState:
        state: PackedState = self.__dict__[KEY]
        return state
