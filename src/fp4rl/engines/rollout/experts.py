"""The inputs of vLLM's routed experts, rounded and counted by the states of the model's stacked parameters.

One kernel of vLLM computes both products of an expert and hides what goes into the second. Where inputs are rounded the
products are computed one by one instead, by the matrices that were read out of the kernel's order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from fp4rl.engines.rollout.mixture import matrices, mixtures, products
from fp4rl.inject.experts import StackState
from fp4rl.sites.walk import layer_of
from fp4rl.spec.errors import InvalidValueError


def experts_of(module: nn.Module, _: Mapping[str, nn.Module], name: str) -> str:
    """Return the name of vLLM's layer for the stacked experts `name`: the one mixture with the number of its layer."""
    names = [own for own in mixtures(module) if layer_of(own) == layer_of(name)]
    if len(names) != 1 or name.rpartition(".")[2] not in ("gate_up_proj", "down_proj"):
        raise InvalidValueError(
            f"rollout.engine vllm: {type(module).__name__} has no place for {name}; take transformers"
        )
    return f"{names[0]}.routed_experts"


@contextmanager
def rounding_experts(layer: Any, members: Sequence[StackState]) -> Iterator[None]:
    """Let a layer of routed experts count, and round the inputs of both products, as its stacks say."""
    computed = layer.forward_modular
    if any(member.input_on for member in members):
        if layer.quant_method.is_monolithic:
            raise InvalidValueError(
                "rollout.engine vllm: this kernel routes and multiplies in one, so that no input of an expert can be "
                "rounded; take transformers, or round weights alone (mode w4a16)"
            )
        computed = _one_by_one(layer, {member.plan.name.rpartition(".")[2]: member for member in members})

    def forward(*args: Any, **kwargs: Any) -> Any:
        for member in members:
            member.count()
            member.numbers[get_ident()] = 0
        return computed(*args, **kwargs)

    layer.forward_modular = forward
    try:
        yield
    finally:
        del layer.forward_modular


def _one_by_one(layer: Any, states: Mapping[str, StackState]) -> Any:
    """Return what stands in for `forward_modular` of vLLM's layer."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

    read = matrices(layer)

    def computed(
        x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None, shared_experts_input: Any = None
    ) -> Tensor:
        if shared_experts is not None:  # computes nothing where the runner has done so already
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        return products(layer, read, states, x, topk_weights, topk_ids)

    return computed
