"""Whether vLLM's model multiplies by the weights of the stream: by value, through the kernels that it computes with.

Kernels may keep a weight in an order of their own and let the tensor go, so that its name proves nothing. Every linear
layer is given the unit matrix instead: what comes out is its weight.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp4rl.engines.rollout.mixture import Read, in_its_order
from fp4rl.spec.errors import EngineDiffers, InvalidValueError

_NAMED = 4  # further tensors that a message names


class Held(NamedTuple):
    """One tensor of the stream beside what the engine holds: values compared, and how many differ; `first` of them."""

    name: str
    values: int
    differing: int
    first: tuple[int, ...] | None = None


@torch.no_grad()
def held(module: nn.Module, stream: Iterable[tuple[str, Tensor]], rows: dict[str, int] | None = None) -> Iterator[Held]:
    """Compare every tensor of a stream with vLLM's model; one that it has no place for differs in all its values.

    `rows` counts, for a stream that comes in parts, how much of each fused layer has come.
    """
    layers, at = dict(module.named_modules()), {} if rows is None else rows
    experts = Read(module)
    for name, given in stream:
        wanted = in_its_order(module, name, given)
        own, kind = name.rpartition(".")[0], name.rpartition(".")[2]
        now = experts.value(name)
        layer_name = next(iter(_layer_names(module, layers, own)), None) if now is None else None
        now = now if layer_name is None else _values(layers[layer_name], kind)
        if now is None:
            yield Held(name, wanted.numel(), wanted.numel(), (0,) * wanted.ndim)
            continue
        if layer_name is not None and layer_name != own:  # a part of a fused layer: its rows come in the engine's order
            begin = at.get(f"{layer_name}.{kind}", 0)
            at[f"{layer_name}.{kind}"] = begin + len(wanted)
            now = now[begin : begin + len(wanted)]
        now = now[: len(wanted)]  # an embedding may be padded
        if now.shape != wanted.shape:
            yield Held(name, wanted.numel(), wanted.numel(), (0,) * wanted.ndim)
            continue
        wanted = wanted.to(now.device, now.dtype)
        wrong = now != wanted
        for head in tied_heads(module, layers[layer_name]) if layer_name is not None and kind == "weight" else ():
            wrong |= _product(head)[: len(wanted)] != wanted
        other = wrong.nonzero()
        yield Held(name, wanted.numel(), len(other), tuple(other[0].tolist()) if len(other) else None)


def require_held(module: nn.Module, stream: Iterable[tuple[str, Tensor]]) -> int:
    """Return the number of tensors compared; EngineDiffers, naming those that differ, where the engine holds others."""
    return require_equal(list(held(module, stream)))


def require_equal(results: Sequence[Held]) -> int:
    """Return the number of tensors; EngineDiffers, naming those that differ."""
    wrong = [each for each in results if each.differing]
    if wrong:
        first, *others = wrong
        also = f"; also {', '.join(each.name for each in others[:_NAMED])}" if others else ""
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise EngineDiffers(
            f"the engine holds other weights than this model computes with: {len(wrong)} of {len(results)} tensors, "
            f"such as {first.name}, in which {first.differing} of {first.values} values differ, the first at "
            f"{first.first}{also}{more}",
            "weights",
            tuple(each.name for each in wrong),
        )
    return len(results)


def tied_heads(module: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return the heads that multiply by the weight of an embedding, and may keep it in an order of their own."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    own = getattr(layer, "weight", None)
    heads = [head for head in module.modules() if isinstance(head, ParallelLMHead) and head is not layer]
    return [head for head in heads if own is not None and head.weight.data_ptr() == own.data_ptr()]


def follow_embeddings(module: nn.Module) -> None:
    """Give tied heads the weight of their embedding after a reload: vLLM 0.32 leaves them what they packed at first."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for layer in module.modules():
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            for head in tied_heads(module, layer):
                method: Any = head.quant_method
                method.process_weights_after_loading(head)


def layer_of(module: Any, layers: Mapping[str, nn.Module], name: str) -> str:
    """Return the name of vLLM's linear layer for a layer of the model: its own, or that of a fused one."""
    for layer_name in _layer_names(module, layers, name):
        if hasattr(layers[layer_name], "quant_method"):
            return layer_name
    raise InvalidValueError(f"rollout.engine vllm: {type(module).__name__} has no layer for {name}; take transformers")


def _layer_names(module: Any, layers: Mapping[str, nn.Module], name: str) -> Iterator[str]:
    parent, _, last = name.rpartition(".")
    fused = [whole for whole, parts in getattr(module, "packed_modules_mapping", {}).items() if last in parts]
    yield from (
        layer_name for layer_name in (f"{parent}.{own}".lstrip(".") for own in (last, *fused)) if layer_name in layers
    )


def _values(layer: Any, kind: str) -> Tensor | None:
    """Return what a layer holds under the name of a parameter: a weight as its kernel multiplies by it."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if kind == "weight" and (unpacked := getattr(layer, "_cpu_unpacked_conv_weight", None)) is not None:
        return _convolution(layer.weight, unpacked)
    value = getattr(layer, kind, None)
    if kind == "weight" and isinstance(layer, LinearBase | ParallelLMHead) and (value is None or value.ndim < 3):
        return _product(layer)  # a convolution has three axes and is read as it is
    return value if isinstance(value, Tensor) else None


def _convolution(packed: Tensor, unpacked: Tensor) -> Tensor:
    """Return the weight [channels, 1, width] of a convolution that is packed for CPUs; NaN where it packs another."""
    from vllm._custom_ops import causal_conv1d_weight_pack

    same = torch.equal(causal_conv1d_weight_pack(unpacked), packed)
    return (unpacked if same else torch.full_like(unpacked, torch.nan)).unsqueeze(1)


def _product(layer: Any) -> Tensor:
    """Return what a layer multiplies by: its product with the unit matrix."""
    sample = next(layer.parameters())
    whole = layer.embedding_dim if hasattr(layer, "embedding_dim") else layer.input_size
    width = getattr(layer, "input_size_per_partition", whole)
    unit = torch.eye(width, dtype=getattr(layer, "params_dtype", sample.dtype), device=sample.device)
    method: Any = layer.quant_method
    bias, layer.bias = layer.bias, None  # kernels may add it themselves
    try:
        product: Tensor = method.apply(layer, unit, None)
    finally:
        layer.bias = bias
    return product.mT
