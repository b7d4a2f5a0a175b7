"""The inputs of vLLM's linear layers, rounded and counted by the states of the sites that they compute."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fp4rl.engines.rollout.held import layer_of
from fp4rl.inject.linear import LinearState
from fp4rl.inject.site import SiteState


@contextmanager
def rounding(module: nn.Module, states: Sequence[SiteState]) -> Iterator[None]:
    """Let the linear layers of vLLM's model count, and round their inputs, as `states` say."""
    layers = dict(module.named_modules())
    of_layer: dict[str, list[LinearState]] = defaultdict(list)
    for state in (state for state in states if isinstance(state, LinearState)):
        of_layer[layer_of(module, layers, state.plan.name)].append(state)
    changed: list[Any] = []
    try:
        for name, members in of_layer.items():
            layer: Any = layers[name]
            layer.quant_method = Rounded(layer.quant_method, members)
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            layer.quant_method = layer.quant_method.method


class Rounded:
    """vLLM's own method of a linear layer, behind the rounding of its input. `members` are the sites fused in it."""

    def __init__(self, method: Any, members: Sequence[LinearState]) -> None:
        self.method, self.members = method, members

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Any:
        """Compute the product with the input rounded where that is active."""
        first, *others = self.members
        rounded = first.rounded_values(x, "input") if first.input_on else x
        for member in self.members:
            member.count()
        for member in others:
            if member.input_on:
                member.note("input", x, rounded, x.numel())
        return self.method.apply(layer, rounded, bias)
