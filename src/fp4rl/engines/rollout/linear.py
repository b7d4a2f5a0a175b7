"""The inputs of vLLM's linear layers, rounded and counted by the states of the sites that they compute."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fp4rl.inject.linear import LinearState


@contextmanager
def rounding_input(layer: Any, members: Sequence[LinearState]) -> Iterator[None]:
    """Let a linear layer of vLLM count, and round its input, as the sites that are fused in it say."""
    layer.quant_method = Rounded(layer.quant_method, members)
    try:
        yield
    finally:
        layer.quant_method = layer.quant_method.method


def not_called(state: LinearState) -> str | None:
    """Return why vLLM does not round the input of a layer in every call, and the cure."""
    if "input" in state.points and state.plan.name.endswith(".kv_b_proj"):
        return (
            "while it decodes (MLA), vLLM multiplies this weight with queries, and not with the input; take "
            "transformers, or leave it out: targets.leave: ['*.kv_b_proj']"
        )
    return None


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
