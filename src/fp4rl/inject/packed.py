"""Live linear layers and stacked experts whose frozen weight exists only as 4-bit codes and scales, 4.25 bits a weight
in MXFP4."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4rl.inject.cache import SharedInput
from fp4rl.inject.experts import ExpertProduct, ExpertsState, StackState
from fp4rl.inject.fused import with_largest
from fp4rl.inject.linear import InjectedLinear, LinearState
from fp4rl.inject.matmul import linear_with_errors
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.site import KEY
from fp4rl.numerics.packing import Packed, dequantize, pack_tensor
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection


class CodesState(LinearState):
    """The state of a packed weight: `take` packs each of its matrices, `give_back` puts the rounded ones back."""

    def __init__(self, plan: SitePlan, injection: Injection, shared: SharedInput) -> None:
        super().__init__(plan, injection, shared)
        self.parameter = plan.site.parameter or "weight"
        self.packed: list[Packed] = []
        self.largest: Tensor | None = None  # of the layers that share a factor
        self.master_dtype = self.dtype
        self._before = self._after = torch.empty(0)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.plan.name}: a packed layer cannot be copied; remove the injection, or take copy")

    def take(self, module: nn.Module) -> None:
        """Pack the module's weight, and put a meta tensor (a shape without memory) in its place."""
        weight = module.get_parameter(self.parameter).detach()
        fmt, matrices = self.plan.weight, self.as_used(weight)
        assert fmt is not None
        self.master_dtype = weight.dtype
        self.packed = [
            self._codes(matrix.contiguous().to(self.dtype), fmt)
            for matrix in (matrices if matrices.ndim == 3 else (matrices,))
        ]
        stride = max(1, weight.numel() // 4096)
        self._before = weight.reshape(-1)[::stride].clone()
        self._after = self.values().reshape(-1)[::stride].clone()
        self._put(module, torch.empty_like(weight, device="meta"))

    def _codes(self, matrix: Tensor, fmt: Format) -> Packed:
        if self.largest is None:
            return pack_tensor(matrix, fmt, name=self.plan.name)
        packed = pack_tensor(with_largest(matrix, self.largest), fmt, name=self.plan.name)
        return replace(packed, data=packed.data[:-1], scales=packed.scales[:-1])

    def give_back(self, module: nn.Module) -> None:
        """Put the rounded weight into the module, where it was packed."""
        if self.packed:
            self._put(module, self.values())
            self.packed = []

    def matrix(self, number: int) -> Tensor:
        """Return one rounded matrix as stored, in the dtype that the master had; unpacked now and not kept."""
        return self.as_used(dequantize(self.packed[number]).to(self.master_dtype)).contiguous()

    def values(self) -> Tensor:
        """Return the whole rounded weight as stored; unpacked now and not kept."""
        return self.matrix(0)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held of the weight."""
        return [tensor for packed in self.packed for tensor in (packed.data, packed.scales)]

    def follow(self, module: nn.Module, sample: Tensor) -> None:
        """Move codes and scales to the device that a tensor of the module was moved to, and unpack to its dtype."""
        device, self.master_dtype = sample.device, sample.dtype
        self._put(module, torch.empty_like(module.get_parameter(self.parameter), dtype=sample.dtype))
        self.packed = [
            replace(
                packed,
                data=packed.data.to(device),
                scales=packed.scales.to(device),
                factor=None if packed.factor is None else packed.factor.to(device),
            )
            for packed in self.packed
        ]

    def would_change(self, point: str, x: Tensor) -> bool:
        """Return False for the weight: codes hold rounded values only, so one that did not change was on the grid."""
        return point != "weight" and super().would_change(point, x)

    def _put(self, module: nn.Module, weight: Tensor) -> None:
        module._parameters[self.parameter] = nn.Parameter(weight, requires_grad=False)


class PackedState(CodesState):
    """The state of a linear layer with a packed weight."""

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


class PackedStack(CodesState, StackState):
    """The state of stacked experts in codes: unpacked while their module's forward runs, and again in the backward."""

    def __init__(self, plan: SitePlan, injection: Injection, shared: SharedInput) -> None:
        super().__init__(plan, injection, shared)
        self._unpacked: dict[int, int] = {}  # by thread, where the stack lies while a forward runs

    def values(self) -> Tensor:
        """Return the whole rounded stack as stored; unpacked now and not kept."""
        return torch.stack([self.matrix(number) for number in range(len(self.packed))])

    def copy_of(self, _weight: Tensor, *_made_from: Tensor) -> Tensor:
        """Return the unpacked stack."""
        self.note("weight", self._before, self._after, 0)
        values = self.values()
        self._unpacked[get_ident()] = values.untyped_storage().data_ptr()
        return values

    def computed(self, product: ExpertProduct) -> Tensor:
        """Compute a product whose backward unpacks again what it needs, where it multiplies by the stack itself."""
        weight = product.weight
        if weight.untyped_storage().data_ptr() == self._unpacked[get_ident()]:  # else a gathered or cast copy
            again = partial(self._unpacked_again, weight.shape, weight.stride(), int(weight.storage_offset()))
            product = replace(product, compute=partial(_UnpackedLater.apply, product.compute, again))
        return super().computed(product)

    def _unpacked_again(self, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
        """Return a part of the stack as a product had it; of one expert where that is all."""
        number, within = divmod(offset, prod(self.plan.site.shape[1:]))
        if len(shape) == 2:
            return self.matrix(number).as_strided(shape, stride, within)
        return self.values().as_strided(shape, stride, offset)


class _UnpackedLater(torch.autograd.Function):
    """Computes a product and saves neither x nor the weight. It is linear in x, so its gradient is that at x = 0."""

    @staticmethod
    def forward(
        ctx: Any, compute: Callable[[Tensor, Tensor], Tensor], again: Callable[[], Tensor], x: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.compute, ctx.again, ctx.shape = compute, again, x.shape
        return compute(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0]
        with torch.enable_grad():
            x = g.new_zeros(ctx.shape).requires_grad_()
            y = ctx.compute(x, ctx.again())
        return None, None, *torch.autograd.grad(y, x, g), None


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


class PackedModule(nn.Module):
    """A module over codes. Its state dict holds the rounded weights; loading a weight packs it."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{state.parameter}": state.values() for state in codes_of(self)})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        loaded = [state for state in codes_of(self) if f"{prefix}{state.parameter}" in state_dict]
        kept = {state.parameter: state.values() for state in loaded if state.largest is not None}
        for state in loaded:
            state.give_back(self)  # loading needs a tensor to load into
        super()._load_from_state_dict(state_dict, prefix, *args)
        for state in loaded:
            if state.largest is not None and not torch.equal(
                self.get_parameter(state.parameter), kept[state.parameter]
            ):
                raise InvalidValueError(
                    f"{state.plan.name}: other weights were loaded under the factor that its group was packed with; "
                    "call remove(), load, and attach again"
                )
            state.take(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        placeholders = {state.parameter: self._parameters.pop(state.parameter) for state in codes_of(self)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters.update(placeholders)
        for state in codes_of(self):
            state.follow(self, fn(torch.empty(0, dtype=state.master_dtype, device=state.packed[0].data.device)))
        return self


class PackedLinear(PackedModule, InjectedLinear):
    """`InjectedLinear` over codes."""


def codes_of(module: nn.Module) -> list[CodesState]:
    """Return the states of a module's packed weights."""
    state = module.__dict__[KEY]
    states = state.stacks.values() if isinstance(state, ExpertsState) else (state,)
    return [state for state in states if isinstance(state, CodesState)]
