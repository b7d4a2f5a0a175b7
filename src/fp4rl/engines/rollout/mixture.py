"""vLLM's mixtures of experts: the matrices that they multiply by, and what comes of them.

Kernels may keep the experts in an order of their own. vLLM's own packing of the numbers 1, 2, 3, ... tells that order,
and by it each expert's matrices are read back, value by value.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4rl.inject.experts import ExpertProduct, StackState
from fp4rl.spec.errors import InvalidValueError

_REORDER = "permute_qk_weight_for_rotary"  # of vLLM's Llama 4 alone
_BASE = 256  # numbers below it are exact in every dtype of weights


class Matrices(NamedTuple):
    """What the experts of a layer multiply by: [experts, gate and up, in] and [experts, out, in]."""

    gate_up: Tensor
    down: Tensor


def mixtures(module: nn.Module) -> dict[str, Any]:
    """Return vLLM's layers of routed experts, by the name that a checkpoint has for them."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    layers = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, RoutedExperts))
    return {name.removesuffix(".routed_experts"): layer for name, layer in layers}


def is_llama4(module: nn.Module) -> bool:
    """Return whether vLLM's loader reorders the rows of q and k within a head, and transposes stacks of experts."""
    return hasattr(module, _REORDER)


def in_its_order(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Return a tensor of the stream in the order in which vLLM's loader stores it."""
    if is_llama4(module):
        weight = getattr(module, _REORDER)(name, weight)[1]
        return weight.mT if weight.ndim == 3 else weight
    return weight


def begin_reload(module: nn.Module) -> None:
    """Let vLLM pack its experts in the reload that follows: 0.32 leaves them unpacked where it has packed once."""
    for layer in mixtures(module).values():
        layer.quant_method.moe_kernel = None


def require_reloaded(module: nn.Module) -> None:
    """Raise InvalidValueError for experts that vLLM's reload has passed by."""
    for name, layer in mixtures(module).items():
        if layer.quant_method.moe_kernel is None:
            raise InvalidValueError(
                f"rollout.engine vllm: {type(module).__name__} loads the experts of {name} past vLLM's reload, which "
                "then keeps the former ones; take transformers"
            )


@torch.no_grad()
def matrices(layer: Any) -> Matrices:
    """Read the matrices of a layer of routed experts out of the order in which its kernel keeps them."""
    inner = layer.moe_config.intermediate_size_per_partition_unpadded
    shapes = (2 * inner, layer.hidden_size), (layer.hidden_size, inner)
    orders = _orders(layer, shapes)
    stored = layer.w13_weight.detach(), layer.w2_weight.detach()
    return Matrices(*map(_read, stored, orders, shapes))


def _read(stored: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return [experts, *shape] of experts kept in `order`: the numbers of their values from 1, 0 for padding."""
    real = order > 0
    if not torch.equal(order[real].sort().values, torch.arange(1, shape[0] * shape[1] + 1, device=order.device)):
        raise InvalidValueError("vLLM keeps experts in an order that cannot be read; take rollout.engine transformers")
    plain = stored.new_empty(len(stored), shape[0] * shape[1])
    plain[:, order[real] - 1] = stored.reshape(len(stored), -1)[:, real]
    return plain.reshape(-1, *shape)


def _orders(layer: Any, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the numbers of one expert's values in the order in which the kernel keeps them, for both its matrices."""
    like, orders = layer.w13_weight, [torch.zeros((), dtype=torch.int64, device=layer.w13_weight.device)] * 2
    numbers = [
        torch.arange(1, rows * columns + 1, device=like.device).reshape(1, rows, columns) for rows, columns in shapes
    ]
    power = 1
    while power <= max(int(number.max()) for number in numbers):
        digits = [(number // power % _BASE).to(like.dtype) for number in numbers]
        packed = _packed(layer, *digits)
        orders = [order + power * digit.reshape(-1).long() for order, digit in zip(orders, packed, strict=True)]
        power *= _BASE
    return orders


def _packed(layer: Any, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrices as vLLM packs them for the kernel of `layer`."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import convert_to_unquantized_kernel_format

    method, own = layer.quant_method, nn.Module()
    own.activation, own.moe_config = layer.activation, copy(layer.moe_config)
    converted = convert_to_unquantized_kernel_format(
        method.unquantized_backend, moe_config=own.moe_config, w13_weight=gate_up, w2_weight=down, layer=own
    )
    own.w13_weight, own.w2_weight = (nn.Parameter(each, requires_grad=False) for each in converted)
    method.moe_kernel.fused_experts.process_weights_after_loading(own)
    return own.w13_weight, own.w2_weight


class Read:
    """The experts' matrices of a model by the names of a checkpoint; each layer is read once."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = mixtures(module)
        self._read: dict[str, Matrices] = {}

    def value(self, name: str) -> Tensor | None:
        """Return what is multiplied by under a name: one expert's matrix, or a stack of all; None if no expert's."""
        own = next((each for each in self._layers if name.startswith(f"{each}.")), None)
        if own is None:
            return None
        layer = self._layers[own]
        if own not in self._read:
            self._read[own] = read = matrices(layer)
            unknown = ~_computed(layer, read)  # a kernel that multiplies by something else
            for stack in read:
                stack[unknown] = torch.nan
        gate_up, down = self._read[own]
        gate, up = gate_up.chunk(2, dim=1)
        parts = {layer.ckpt_gate_proj_name: gate, layer.ckpt_up_proj_name: up, layer.ckpt_down_proj_name: down}
        number, _, part = name.removeprefix(f"{own}.").removesuffix(".weight").rpartition(".")
        if not number:
            return {**parts, "gate_up_proj": gate_up}.get(part)
        return parts[part][int(number)] if part in parts and number.isdigit() else None


def _computed(layer: Any, read: Matrices) -> Tensor:
    """Return whether the kernel computes with these matrices, for each expert: [experts]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(read.down), layer.hidden_size, generator=generator).to(read.down)
    ids = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    shares = torch.ones_like(ids, dtype=torch.float32)
    by_kernel: Tensor = layer.quant_method.apply(layer, x.clone(), shares, ids, None, None).float()
    apart = (by_kernel - products(layer, read, {}, x, shares, ids).float()).abs().amax(-1)
    return apart.le(torch.finfo(x.dtype).eps ** 0.5 * by_kernel.abs().amax(-1))


def products(
    layer: Any, read: Matrices, states: Mapping[str, StackState], x: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    """Return y [tokens, hidden] of x [tokens, hidden] with its experts `ids` and their shares [tokens, k].

    `states` round what goes into a product, by the name of its parameter in the model.
    """
    from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation

    order = ids.flatten().argsort(stable=True)  # the rows of each expert together, in the order of the tokens
    tokens, shares = order // ids.shape[1], weights.flatten()[order, None]
    counts = ids.flatten().bincount(minlength=len(read.down)).tolist()
    rows = x[tokens]
    if layer.apply_router_weight_on_input:
        rows, shares = rows * shares.to(x.dtype), torch.ones_like(shares)
    both = _product(states.get("gate_up_proj"), counts, rows, read.gate_up, getattr(layer, "w13_bias", None))
    inner = apply_moe_activation(layer.activation, both.new_empty(len(both), both.shape[1] // 2), both)
    made = _product(states.get("down_proj"), counts, inner, read.down, getattr(layer, "w2_bias", None))
    return torch.zeros_like(x).index_add_(0, tokens, (made * shares).to(x.dtype))


def _product(state: StackState | None, counts: list[int], x: Tensor, stack: Tensor, bias: Tensor | None) -> Tensor:
    product = ExpertProduct(partial(_by_expert, counts, bias), x, stack)
    return product.compute(x, stack) if state is None else state.computed(product)


def _by_expert(counts: list[int], bias: Tensor | None, x: Tensor, stack: Tensor) -> Tensor:
    biases = [None] * len(stack) if bias is None else bias.unbind()
    return torch.cat([linear(*each) for each in zip(torch.split(x, counts), stack, biases, strict=True)])
