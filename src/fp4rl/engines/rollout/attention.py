"""The keys and values that vLLM caches, rounded and counted by the state of the attention that makes them.

They are rounded where they are handed to the module that stores them: after the rotary embedding, a token and a head
for itself. transformers' cache is rounded whenever it is read, to the same values.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fp4rl.engines.rollout.mixture import is_llama4
from fp4rl.inject.attention import AttentionState
from fp4rl.spec.errors import InvalidValueError

_SHARED = "kv_sharing_target_layer_name"  # of vLLM's layers that read the cache of another


def cache_of(module: nn.Module, modules: Mapping[str, nn.Module], name: str) -> str:
    """Return the name of vLLM's module that stores the keys and values of an attention site.

    Raises InvalidValueError, naming the cause, where it stores others than these in the dtype of the model.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    below = ((path, each) for path, each in modules.items() if f"{path}.".startswith(f"{name}."))
    caches = [path for path, each in below if isinstance(each, AttentionLayerBase)]
    readers = {path: getattr(each, _SHARED, None) for path, each in modules.items() if getattr(each, _SHARED, None)}
    cure = f"take transformers, or leave this attention out: targets.leave: [{name}]"
    if readers:
        wrong, cure = "{} reads the cache of {}".format(*next(iter(readers.items()))), "take transformers"
    elif getattr(module, "is_hybrid", False):
        wrong, cure = f"{type(module).__name__} keeps states beside caches, which was never tried", "take transformers"
    elif is_llama4(module):
        wrong, cure = f"{type(module).__name__} stores the values of a key in another order", "take transformers"
    elif len(caches) != 1:
        wrong = f"{type(module).__name__} has {len(caches)} caches there"
    else:
        wrong = _wrong_cache(modules[caches[0]])
    if wrong:
        raise InvalidValueError(f"rollout.engine vllm does not store what kv_cache of {name} rounds: {wrong}; {cure}")
    return caches[0]


def _wrong_cache(layer: Any) -> str:
    from vllm.model_executor.layers.attention import Attention

    kind = type(layer).__name__
    if not isinstance(layer, Attention) or layer.attn_type != "decoder":
        return f"{kind} keeps no keys and values per head of the tokens before"
    if layer.kv_cache_torch_dtype != layer.dtype:
        return f"{kind} stores {layer.kv_cache_dtype}, which rounds once more (--kv-cache-dtype auto does not)"
    return ""


@contextmanager
def rounding_cache(layer: Any, members: Sequence[AttentionState]) -> Iterator[None]:
    """Let an attention layer of vLLM count, and round what it stores, as its site says."""
    (state,) = members
    compute = layer.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state.count()
        key = state.stored(key.view(-1, layer.num_kv_heads, layer.head_size))
        value = state.stored(value.view(-1, layer.num_kv_heads, layer.head_size_v))
        return compute(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def not_stored(state: AttentionState) -> str | None:
    """Return why a cache that is written once, a token and a head for itself, holds other values than the site's."""
    fmt = state.plan.kv_cache
    if fmt is None or "kv_cache" not in state.points:
        return None
    if state.latent:
        kind = state.original.__name__
        return f"{kind} stores latent vectors (MLA), which vLLM's kernels read as they are; take transformers"
    if fmt.rounding == "stochastic":
        return f"{fmt.name} is drawn anew whenever transformers reads it; take rounding: nearest_even"
    if fmt.spans_rows:
        return f"{fmt.name} has one number for several tokens; take factor: per_token or static, and blocks of one row"
    return None
