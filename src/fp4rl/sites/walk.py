"""Find every site of a model: whatever holds a weight or computes attention, named as in the checkpoint.

A weight's matmul sums over its last axis, or over the one before it (stored transposed). Sizes tell which, but not for
square matrices, and the class can be wrong about it; for injected experts the real products confirm it (`experts`).
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from fp4rl.sites.attention import attention_modules, mixers
from fp4rl.sites.modalities import text_modules
from fp4rl.spec.targets import matches

Kind = Literal["linear", "experts", "router", "attention", "norm", "embedding", "adapter", "other"]

# What PEFT, DDP, torch.compile and FSDP put into names; without these parts a site has one name in every process.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.default)(\.|$)"
)
_ROOTS = re.compile(r"^(module\.)*(base_model\.model\.)?")
_ROLES = {
    "q": ("q_proj", "wq", "query", "q"),
    "k": ("k_proj", "wk", "key", "k"),
    "v": ("v_proj", "wv", "value", "v"),
    "qkv": ("qkv_proj", "query_key_value", "wqkv", "c_attn"),
    "kv": ("kv_proj",),
    "o": ("o_proj", "wo", "out_proj", "dense"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2"),
    "lm_head": ("lm_head", "embed_out"),
    "router": ("router", "gate", "shared_expert_gate"),
}
_ROUTES = re.compile("Router|(?<!Forget)(?<!Residual)Gat(e|ing)$")
_UP = ("gate_up_proj", "gate_proj", "up_proj")
_DOWN = ("down_proj",)
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
# The words for a part of a model, which a pattern may be.
PARTS = ("experts", "shared_experts", "attention", "mlp", "router", "head", "embedding", "norm", "sinks")
OTHER_MODALITY = "other modality"  # the role of what sees or hears in a multimodal model, and of what projects it
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words}


@dataclass(frozen=True)
class Site:
    """One site. `name` is free of wrappers, `path` is the module's real place, `parameter` its weight's name.

    `shape` is [out, in] of a linear weight and [experts, out, in] of stacked experts, whichever way they are stored:
    `transposed` says that the parameter's last two axes are exchanged; None: unknown. `layer` counts from 0 and is None
    outside the layers. `also` are the places of other linear layers that hold the same weight, or of the same module:
    all of them are one site. `shares` names a site of another kind, or the head, that holds the same parameter.
    `part` is the part of the model: experts, shared_experts, attention (all that mixes tokens), mlp, router, head, ...
    """

    name: str
    path: str
    kind: Kind
    role: str
    layer: int | None
    shape: tuple[int, ...]
    parameter: str | None = "weight"
    shares: str | None = None
    also: tuple[str, ...] = ()
    transposed: bool | None = False
    part: str = ""

    def is_meant_by(self, pattern: str) -> bool:
        """Return whether a pattern covers one of its names, or is the word for its part of the model."""
        return pattern == self.part or any(matches(name, pattern) for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a pattern may mean: plain ones, and those with what wraps the model."""
        places = (name for path in self.also for name in (plain_name(path), path))
        return tuple(dict.fromkeys(name for name in (self.name, self.path, *places) if name))

    @property
    def places(self) -> tuple[str, ...]:
        """The paths of all modules that hold the weight."""
        return (self.path, *self.also)

    @property
    def parent(self) -> str:
        """The module above, where the members of a fused group meet."""
        return self.name.rpartition(".")[0]

    @property
    def fused_group(self) -> str | None:
        """The group of sites that read one tensor and that a serving kernel fuses: q, k and v, or gate and up."""
        return f"{self.parent}.{_FUSED[self.role]}" if self.role in _FUSED else None


def walk(model: nn.Module) -> tuple[Site, ...]:
    """Return all sites of `model` in its own order, on any device, meta included; nothing is changed or read."""
    first: dict[int, int] = {}
    sites: list[Site] = []
    hidden, routers, used_as = _width(model), _routers(model), _used_as(model)
    attending = attention_modules(model)
    mixing = mixers(model, attending)
    text = text_modules(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if "original_module" in path.split("."):  # PEFT's unused original of a module that it trains fully
            continue
        for site, weight in _at(path, module, hidden, attends=id(module) in attending):
            if weight is not None and weight.ndim > 1 and path.startswith(routers):
                site = replace(site, kind="router", role="router")
            if site.kind == "linear" and id(module) in used_as:
                site = replace(site, role=used_as[id(module)])
            if text is not None and id(module) not in text:
                site = replace(site, role=OTHER_MODALITY, layer=None)
            else:
                site = replace(site, part=_part(site, path.startswith(mixing)))
            _add(sites, first, site, module if weight is None else weight)
    queried = {site.parent for site in sites if site.role == "q"}
    alone = {site for site in sites if site.role in ("k", "v") and site.parent not in queried}
    # Keys and values that no query meets (RWKV) read tensors of their own.
    return tuple(replace(site, role="linear") if site in alone else site for site in sites)


def _add(sites: list[Site], first: dict[int, int], site: Site, held: nn.Module | Tensor) -> None:
    """Append a site, or, where what it holds has one of its kind already, add its place to that."""
    number = first.setdefault(id(held), len(sites))
    owner = sites[number] if number < len(sites) else None
    if owner is None:
        sites.append(site)
    elif owner.kind == site.kind in ("linear", "attention") and "lm_head" not in (owner.role, site.role):
        sites[number] = replace(owner, also=(*owner.also, site.path))
    else:
        sites.append(replace(site, shares=owner.name))


def plain_name(path: str) -> str:
    """Return a module's or parameter's name as in the checkpoint, without what adapters, compilers, sharding add."""
    return _WRAPPERS.sub("", _ROOTS.sub("", path)).rstrip(".")


def layer_of(name: str) -> int | None:
    """Return the layer a dotted name belongs to: its first whole-number segment."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def layer_count(sites: tuple[Site, ...]) -> int:
    """Return the number of layers (0 for a model without numbered layers)."""
    return max((site.layer + 1 for site in sites if site.layer is not None), default=0)


def as_used(site: Site, weight: Tensor) -> Tensor:
    """Return a parameter, or a tensor like it, as a view [..., out, in]."""
    return weight.mT if site.transposed else weight


def _width(model: nn.Module) -> int | None:
    """Return the width of the residual stream, where a config names it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "hidden_size", None)
    return width if isinstance(width, int) else None


def _used_as(model: nn.Module) -> dict[int, str]:
    """Return id -> role of linear layers whose use, not their name, tells the role: the one that makes the logits, and
    the step size of a state space model, whose weight is read without calling the layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    roles = {id(head): "lm_head"} if head is not None else {}
    mixers = (m for m in model.modules() if hasattr(m, "A_log") and isinstance(getattr(m, "dt_proj", None), nn.Linear))
    return roles | {id(mixer.dt_proj): "dt_proj" for mixer in mixers}


def _routers(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of all paths below a router: its projections decide on routes too."""
    kinds = ((path, type(module).__name__) for path, module in model.named_modules(remove_duplicate=False) if path)
    routing = (path for path, kind in kinds if path.endswith("router") or _ROUTES.search(kind))
    return tuple(f"{path}." for path in routing)


def _part(site: Site, mixes_tokens: bool) -> str:
    if site.role == "lm_head":
        return "head"
    if site.kind not in ("linear", "experts"):
        return "sinks" if site.name.endswith("sinks") else site.kind
    if re.search(r"shared_?(expert|mlp)", site.name):
        return "shared_experts"
    if site.kind == "experts" or "experts" in site.name.split("."):
        return "experts"
    return "attention" if mixes_tokens else "mlp"


def _at(
    path: str, module: nn.Module, hidden: int | None, *, attends: bool
) -> Iterator[tuple[Site, nn.Parameter | None]]:
    """Yield the sites at one module: its attention, and each of its own weights. A lone layer is named by its class."""
    name = plain_name(path) or type(module).__name__
    if attends:
        yield Site(name, path, "attention", "attention", layer_of(name), (), None), None
    own_weights = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear) and "weight" not in own_weights:  # computed from something else
        shape = (module.out_features, module.in_features)
        yield (
            Site(name, path, "linear", _role(name, "linear"), layer_of(name), shape, None),
            None,
        )
    for parameter, weight in own_weights.items():
        kind = _kind(name, module, parameter, weight)
        if kind is None:
            continue
        own = name if parameter == "weight" else f"{name}.{parameter}"
        role = "router" if kind == "router" else _role(own, kind)
        transposed = _transposed(kind, module, parameter, weight, hidden)
        sizes = tuple(weight.mT.shape if transposed else weight.shape)
        yield Site(own, path, kind, role, layer_of(own), sizes, parameter, transposed=transposed), weight


def _role(name: str, otherwise: str) -> str:
    return _ROLE_OF.get(name.rpartition(".")[2].lower(), otherwise)


def _transposed(kind: Kind, module: nn.Module, parameter: str, weight: Tensor, hidden: int | None) -> bool | None:
    if kind == "experts" and weight.ndim == 3:
        return experts_transposed(module, parameter, hidden)
    return kind == "linear" and is_conv1d(module)


def _kind(name: str, module: nn.Module, parameter: str, weight: nn.Parameter) -> Kind | None:
    if parameter == "bias" or parameter.endswith("_bias"):
        return None
    last = name.rpartition(".")[2]
    if ".lora_" in name or "lora_magnitude" in name:
        return "adapter"
    if "Router" in type(module).__name__ or (_ROLE_OF.get(last) == "router" and weight.ndim == 2):
        return "router"
    if isinstance(module, nn.Linear) or (is_conv1d(module) and weight.ndim == 2):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if weight.ndim in (2, 3) and ("experts" in name.split(".") or "Expert" in type(module).__name__):
        return "experts"
    return "norm" if weight.ndim == 1 and "norm" in type(module).__name__.lower() else "other"


def is_conv1d(module: nn.Module) -> bool:
    """Return whether it is transformers' `Conv1D`, the linear layer of GPT-2, whose weight is [in, out]."""
    own = sys.modules.get("transformers.pytorch_utils")  # never imported here: without it there is none
    return own is not None and isinstance(module, own.Conv1D)


def experts_transposed(module: nn.Module, parameter: str, hidden: int | None) -> bool | None:
    """Return whether stacked experts are stored [experts, in, out], not [experts, out, in]; None where unknown.

    The class says so, or the sizes tell: the width of the model, `hidden`, goes into the first matmul and comes out of
    the second. Where one matrix is square, the other one in the module tells.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    transposed = {name: _by_sizes(module, name, shape, hidden) for name, shape in shapes.items()}
    own = transposed.get(parameter)
    known = {value for value in transposed.values() if value is not None}
    return own if own is not None else known.pop() if len(known) == 1 else None


def _by_sizes(module: Any, parameter: str, shape: tuple[int, ...], hidden: int | None) -> bool | None:
    first, second = shape[1:]
    if first == second:
        return None
    if hasattr(module, "input_size") and hasattr(module, "output_size"):
        sizes = module.output_size, module.input_size
        return False if sizes == (first, second) else True if sizes == (second, first) else None
    width = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None) or hidden
    if width not in (first, second) or parameter not in (*_UP, *_DOWN):
        return None
    return (first == width) == (parameter in _UP)
