"""The weights that a sampler must hold: those of the live model as it computes with them, by name, one at a time.

Rounded where rounding is active in the present phase, with the noise that is on them now, adapters merged. Whatever
samples or scores for this model in another engine gets its weights from here alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from fp4rl.inject.adapted import AdaptedSum
from fp4rl.inject.experts import ExpertsState
from fp4rl.inject.install import is_injected
from fp4rl.inject.linear import LinearState
from fp4rl.inject.packed import codes_of
from fp4rl.inject.site import KEY, SiteState
from fp4rl.rl.sharding import gathered_in_turn
from fp4rl.sites.walk import plain_name
from fp4rl.spec.errors import InvalidValueError


@torch.no_grad()
def weight_stream(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight and persistent buffer of `model` as `save_pretrained` would name it, in the model's order.

    Stacked experts come as the files of their model hold them. A weight that is held at several places comes once,
    under its first name. Sharded weights are gathered, one layer at a time, by all processes together. Raises
    InvalidValueError for an adapter beside rounded inputs, which is no product with one matrix.
    """
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    adapters = {
        (id(each.get_base_layer()), getattr(each, "parameter_name", "weight")): each for each in _adapted(model)
    }
    met: set[int] = set()
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    for path, module in gathered_in_turn(model) if sharded else model.named_modules():
        if _is_adapter(path) or "original_module" in path.split("."):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in met:
                met.add(id(parameter))
                whole = _as_computed(module, name, parameter, adapters.get((id(module), name))).detach()
                whole = whole.clone() if sharded else whole  # what was gathered is freed with its layer
                yield from revert_weight_conversion(inner, {plain_name(f"{path}.{name}"): whole}).items()
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield plain_name(f"{path}.{name}"), buffer.detach()


def injected_states(model: nn.Module) -> list[SiteState]:
    """Return the state of every site of a model under injection, each once; none without one."""
    states: dict[int, SiteState] = {}
    for module in model.modules():
        if is_injected(module):
            state = module.__dict__[KEY]
            each = state.stacks.values() if isinstance(state, ExpertsState) else (state,)
            states |= {id(own): own for own in each if isinstance(own, SiteState)}
    return list(states.values())


def _as_computed(module: nn.Module, name: str, parameter: Tensor, adapter: Any) -> Tensor:
    """Return what a parameter reads as in a forward now."""
    state: Any = module.__dict__[KEY] if is_injected(module) else None
    stack = state.stacks.get(name) if isinstance(state, ExpertsState) else None
    if stack is not None:
        if stack.weight_on and stack.transposed is None:
            raise InvalidValueError(
                f"{stack.plan.name}: nothing tells how this square stack is stored before a product was computed with "
                "it, so along which axis it is rounded; sample with rollout.engine transformers"
            )
        value, beside = stack.reads_as(parameter, adapter)
        _require_one_matrix(stack, beside)
        return value if beside is None else value + beside
    merged: Any = adapter.__dict__[KEY] if adapter is not None and is_injected(adapter) else None
    if name != "weight" or not isinstance(merged or state, LinearState):
        return _with(adapter, parameter) if name == "weight" else parameter
    if merged is not None:
        whole = AdaptedSum(adapter)
        return merged.rounded_weight(whole) if merged.weight_on else whole.weight
    for codes in codes_of(module):
        return _with(adapter, codes.values())
    rounded = state.rounded_weight(module) if state.weight_on else parameter
    _require_one_matrix(state, adapter)
    return _with(adapter, rounded)


def _require_one_matrix(state: LinearState, beside: Any) -> None:
    if beside is not None and state.input_on:
        raise InvalidValueError(
            f"{state.plan.name}: Q(W) Q(x) + BA x is no product with one matrix; take lora: merged for this sampler"
        )


def _with(adapter: Any, weight: Tensor) -> Tensor:
    if adapter is None:
        return weight
    delta = AdaptedSum(adapter).delta
    return weight if delta is None else weight + delta


def _adapted(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_A"))


def _is_adapter(path: str) -> bool:
    return any(part.startswith("lora_") for part in path.split("."))
