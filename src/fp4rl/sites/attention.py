"""Find attention, what computes keys and values from tokens: by the names of its projections, and by its class."""

import re

from torch import nn

# The projections of keys and values (all but the first pair count only in a class called attention), and the parameters
# by which a recurrent layer is recognised.
_CACHED = [
    {"k_proj", "v_proj"},
    {"query", "key", "value"},
    {"k_lin", "v_lin"},
    {"Wk", "Wv"},
    {"project_k", "project_v"},
]
_CACHED += [{name} for name in ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "kv_proj", "kv_b_proj")]
_RECURRENT = ("A_log", "dt_bias", "time_decay")
_MIXES_TOKENS = re.compile("(Att(entio)?n|DeltaNet|RecurrentBlock|ShortConv)$")


def attention_modules(model: nn.Module) -> set[int]:
    """Return the modules, by `id`, of every class that is attention somewhere: some layers attend to another's keys and
    values (Gemma-3n, Gemma-4), and have no projections for them."""
    kinds = {_kind_of(module) for module in model.modules() if is_attention(module)}
    return {id(module) for module in model.modules() if _kind_of(module) in kinds}


def _kind_of(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Injected")


def is_attention(module: nn.Module) -> bool:
    """Return whether this module computes keys and values from tokens and attends to them: a cache would hold them.

    Recurrent layers (state spaces, delta rules, lightning attention) may have such projections, but keep a state.
    """
    children, kind = {name for name, _ in module.named_children()}, type(module).__name__
    projects = _CACHED[0] <= children or ("Att" in kind and any(names <= children for names in _CACHED))
    return projects and not (_keeps_state(module, recurse=True) or "Lightning" in kind)


def _keeps_state(module: nn.Module, *, recurse: bool = False) -> bool:
    return any(name.rpartition(".")[2] in _RECURRENT for name, _ in module.named_parameters(recurse=recurse))


def mixers(model: nn.Module, attending: set[int]) -> tuple[str, ...]:
    """Return the beginnings of every path below what mixes tokens: attention, delta rules, state spaces."""
    modules = ((path, module) for path, module in model.named_modules(remove_duplicate=False) if path)
    return tuple(
        f"{path}."
        for path, m in modules
        if id(m) in attending or _MIXES_TOKENS.search(type(m).__name__) or _keeps_state(m)
    )
