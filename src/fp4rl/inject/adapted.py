"""peft's adapters under injection: the sum Q(W + sBA), which is deployed when adapters are merged before rounding, and
what adapters of stacked experts add to Q(W)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.inject.linear import LinearState
from fp4rl.inject.site import KEY
from fp4rl.sites.walk import Site
from fp4rl.spec.errors import InvalidValueError


class MergedState(LinearState):
    """The state of a layer with adapters. The gradient reaches A and B through the rounding of the sum."""

    def forward(self, layer: Any, x: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        """Return the layer's result with one rounded weight, the sum of the base and its active adapters."""
        if kwargs.get("adapter_names") is not None:
            raise InvalidValueError(f"{self.plan.name}: one batch with several adapters has no single merged weight")
        if not self.weight_on:
            original: Any = self.original
            self.calls += 1
            return original.forward(layer, x, **kwargs)  # type: ignore[no-any-return]
        return super().forward(AdaptedSum(layer), x)  # type: ignore[arg-type]

    def master(self, layer: Any) -> Tensor:
        """Return the sum of base and active adapters as [out, in], computed now; it is kept nowhere."""
        return self.as_used(AdaptedSum(layer).weight)

    def rounded_weight(self, layer: Any) -> Tensor:
        """Return the rounded sum."""
        return rounded_sum(self, layer)

    def sources(self, layer: Any) -> tuple[Tensor, ...]:
        """Return the base weight and the adapters."""
        return AdaptedSum(layer).sources

    def scalings(self, layer: Any) -> tuple[float, ...]:
        """Return the scalings of the active adapters."""
        return AdaptedSum(layer).scaling


def rounded_sum(state: LinearState, adapted: "AdaptedSum") -> Tensor:
    """Return the rounded sum; computed again whenever the base, an adapter or its scaling may have changed."""
    sources, scaling = (*adapted.sources, *state.beside()), adapted.scaling
    if scaling != state.scaling:
        state.cache.forget()
        state.scaling = scaling
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        copy = state.cache.get(*sources)
        if copy is not None:  # no need to make the sum
            return copy
    return state.copy_of(adapted.weight, *sources)


class AdaptedSum:
    """Presents a LoRA layer as a linear one: a weight and a bias, computed from `sources` and `scaling`.

    Also for the layer that peft puts above stacked experts, where A is [experts x r, in] and B [out, r x experts].
    """

    def __init__(self, layer: Any) -> None:
        active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        names = [name for name in active if name in layer.lora_A]
        self.base: nn.Module = layer.get_base_layer()
        self.bias = getattr(self.base, "bias", None)
        self.pairs = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
        stored: Any = self.base._parameters[getattr(layer, "parameter_name", "weight")]
        self.sources: tuple[Tensor, ...] = (stored, *(weight for pair in self.pairs for weight in pair))
        self.scaling: tuple[float, ...] = tuple(layer.scaling[name] for name in names)
        # Stored [in, out]: GPT-2's layers, and experts that peft takes for what they are.
        self._turned = getattr(layer, "fan_in_fan_out", False) or not getattr(layer, "_did_swap_in_out_features", True)

    @property
    def weight(self) -> Tensor:
        """W + sum of s B A, in W's dtype."""
        return sum(self._products(), start=self.sources[0])

    @property
    def delta(self) -> Tensor | None:
        """The sum of s B A alone, as W is stored and in its dtype; None where no adapter is active."""
        products = list(self._products())
        return sum(products[1:], start=products[0]).contiguous() if products else None

    def _products(self) -> Iterator[Tensor]:
        stored = self.sources[0]
        for (a, b), scaling in zip(self.pairs, self.scaling, strict=True):
            with torch.autocast(a.device.type, enabled=False):
                if stored.ndim == 3:
                    a, b = a.unflatten(0, (len(stored), -1)), b.unflatten(1, (-1, len(stored))).permute(2, 0, 1)
                product = (b @ a * scaling).to(stored.dtype)
            yield product.mT if self._turned else product


class ForwardingState:
    """The state of a layer that peft puts above stacked experts: those below add its adapter themselves.

    peft would replace their parameter by a sum for the time of a call, out of reach of rounding.
    """

    stacked: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.original: type[nn.Module] = nn.Module
        self.removed = False

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the layer below, which adds this adapter."""
        if self.removed:
            original: Any = self.original
            return original.forward(layer, *args, **kwargs)
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        with layer.get_base_layer().__dict__[KEY].adapted_by(layer):
            return layer.base_layer(*args, **kwargs)


def adapter_of(model: nn.Module, site: Site) -> Any:
    """Return the layer in which peft keeps the adapter of a site's weight, None where it has none."""
    path = site.path
    while path.endswith("base_layer"):
        path = path.rpartition(".")[0]
        layer = model.get_submodule(path)
        if hasattr(layer, "lora_A") and (site.kind != "experts" or layer.parameter_name == site.parameter):
            return layer
    return None
