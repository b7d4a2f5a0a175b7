"""A live LoRA layer that computes Q(W + sBA): what is deployed when adapters are merged before rounding."""

from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.inject.linear import LinearState
from fp4rl.spec.errors import InvalidValueError


class MergedState(LinearState):
    """The state of a layer with adapters. The gradient reaches A and B through the rounding of the sum."""

    scaling: tuple[float, ...] = ()  # of the adapters in the kept copy

    def forward(self, layer: Any, x: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Return the layer's result with the rounded sum of base and active adapters instead of both."""
        if kwargs.get("adapter_names") is not None:
            raise InvalidValueError(f"{self.plan.name}: one batch with several adapters has no single merged weight")
        if not self.weight_on:
            original: Any = self.original
            self.calls += 1
            return original.forward(layer, x, **kwargs)  # type: ignore[no-any-return]
        return super().forward(AdaptedSum(layer), x)  # type: ignore[arg-type]

    def master(self, layer: Any) -> Tensor:
        """Return the sum of base and active adapters, which exists for the moment alone."""
        return AdaptedSum(layer).weight

    def rounded_weight(self, layer: Any) -> Tensor:
        """Return the rounded sum; made afresh whenever the base, an adapter or its scaling may have changed."""
        sources, scaling = layer.sources, layer.scaling
        if scaling != self.scaling:
            self.cache.forget()
            self.scaling = scaling
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            copy = self.cache.get(*sources)
            if copy is not None:  # no need to make the sum
                return copy
        return self.copy_of(layer.weight, *sources)


class AdaptedSum:
    """A LoRA layer as the code of a linear one sees it: a weight and a bias, made from `sources` by `scaling`."""

    def __init__(self, layer: Any) -> None:
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        names = [name for name in active if name in layer.lora_A]
        self.base: nn.Linear = layer.base_layer
        self.bias = self.base.bias
        self.pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
        self.sources: tuple[Tensor, ...] = (self.base.weight, *(weight for pair in self.pairs for weight in pair))
        self.scaling: tuple[float, ...] = tuple(layer.scaling[name] for name in names)

    @property
    def weight(self) -> Tensor:
        """W + sum of s B A, in W's dtype."""
        total = self.base.weight
        for (a, b), scaling in zip(self.pairs, self.scaling, strict=True):
            total = total + (b @ a * scaling).to(total.dtype)
        return total
