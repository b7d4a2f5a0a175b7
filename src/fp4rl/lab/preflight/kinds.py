"""Every kind of site that an injection makes of a model, and a small live object like it, in float64 at random."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.inject.adapted import adapter_of
from fp4rl.inject.attention import EXPANDS
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.lab.preflight.products import IN_BANDS
from fp4rl.sites.walk import is_conv1d, walk
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, ApplyDuring
from fp4rl.spec.targets import Targets

ROWS, WIDTH = 96, 128
EXPERTS, HIDDEN, INNER = 4, 64, 96
# Sizes of a small configuration, by every name that configurations have for them.
_SIZES = {
    "hidden_size": HIDDEN,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 32),
    "head_dim": 32,
}
_STACKED = 3
_CALLED_WITH = {"self", "hidden_states", "position_embeddings", "attention_mask"}
_BARE: dict[str, Any] = {
    "mode": None,
    "deployment": None,
    "by_pattern": (),
    "targets": Targets(),
    "apply_during": ApplyDuring(),
    "fused_groups": "free",
    "frozen_base": "copy",
}


@dataclass(frozen=True)
class Kind:
    """One kind of site: what is done there, by parameter of stacked experts, else under `site`; the module that does it
    where its class matters: experts, attention over latents, peft's layer, one stored [in, out]; None: any other.
    `outermost` is the module that calls experts: themselves, or the first of peft's layers above them."""

    sites: Mapping[str, Injection]
    attends: bool
    like: Any = None
    model: Any = None
    outermost: Any = None

    @property
    def adapters(self) -> dict[str, Any]:
        """peft's layers above stacked experts, by parameter."""
        return {layer.parameter_name: layer for layer in layers_above(self.outermost)}

    @property
    def site(self) -> Injection:
        """What is done, where that is one thing."""
        return next(iter(self.sites.values()))

    @property
    def how(self) -> str:
        """The implementation that computes stacked experts; the name of a class that computes them in its own way."""
        config = getattr(self.like, "config", None)  # a class without one computes in one way of its own
        return type(self.like).__name__ if config is None else str(config._experts_implementation)

    @property
    def key(self) -> Any:
        """What tells kinds apart."""
        by_name = tuple(self.sites.items())
        layers = [self.like, *self.adapters.values()]
        scaling = str([(getattr(own, "parameter_name", ""), getattr(own, "scaling", "")) for own in layers])
        return by_name, self.attends, type(self.like), scaling, self.how if len(self.stacks) else ""

    @property
    def stacks(self) -> tuple[str, ...]:
        """The parameters, where these are stacked experts."""
        return tuple(name for name in self.sites if name != "site")

    @property
    def what(self) -> str:
        """What it is, in words or by its class."""
        if self.like is None:
            return "attention" if self.attends else "layers"
        return "layers with LoRA" if hasattr(self.like, "lora_A") else type(self.like).__name__

    @property
    def unwritten(self) -> str | None:
        """The class whose formula is not written here; None where it is."""
        like, name = self.like, type(self.like).__name__
        if self.stacks:
            held = {own for own, weight in like.named_parameters(recurse=False) if weight.ndim == _STACKED}
            written = held in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
            known = name == IN_BANDS or (hasattr(like, "_is_expert_parallel") and not like.has_post_expert_norm)
            return None if written and known and _needed(type(like)) <= {"config"} else name
        if self.attends and like is not None:
            known = _needed(type(like).forward) <= _CALLED_WITH and not hasattr(like, "indexer")
            return None if known and _needed(type(like)) <= {"config", "layer_idx"} else name
        return None


def _needed(function: Any) -> set[str]:
    """Return the names of the arguments that a function has no default for."""
    own = signature(function).parameters.values()
    return {p.name for p in own if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def kinds_of(model: nn.Module, injection: Injection) -> Iterator[Kind]:
    """Yield each kind of site that resolving an injection gives, once."""
    by_module: dict[str, list[SitePlan]] = defaultdict(list)
    for plan in resolve(model, injection).plans:
        by_module[plan.site.path].append(plan)
    seen = set()
    for path, plans in by_module.items():
        what, module = plans[0].site.kind, model.get_submodule(path)
        stacks = {plan.site.parameter if what == "experts" else "site": _alone(plan, injection) for plan in plans}
        latent = module if hasattr(module, EXPANDS) else None
        own = adapter_of(model, plans[0].site) or (module if is_conv1d(module) else None)
        like = module if what == "experts" else latent if what == "attention" else own
        outermost = model.get_submodule(path.removesuffix(".base_layer" * path.split(".").count("base_layer")))
        kind = Kind({str(name): own for name, own in stacks.items()}, what == "attention", like, model, outermost)
        if kind.key not in seen:
            seen.add(kind.key)
            yield kind


def _alone(plan: SitePlan, injection: Injection) -> Injection:
    """Return what is done to one site as an injection of its own."""
    formats = {point: _of_its_own(getattr(plan, point)) for point in FORMAT_POINTS}
    more = {"errors": plan.errors, "lora": "merged" if plan.merged else "adapter"}
    return injection.model_copy(update=_BARE | formats | more)


def _of_its_own(fmt: Format | None) -> Format | None:
    # One layer alone shares its factor with no other.
    return replace(fmt, factor="tensor") if fmt is not None and fmt.factor == "fused" else fmt


def table_of(model: nn.Module, sites: Mapping[str, Injection]) -> SiteTable:
    """Return the table that does to the only site of a small model what is named."""
    plans = []
    for site in walk(model):
        own = sites.get(str(site.parameter) if site.kind == "experts" else "site")
        if own is not None and site.kind in ("linear", "experts", "attention") and acts_on(site.kind, own):
            formats = {point: getattr(own, point) for point in FORMAT_POINTS}
            plans.append(SitePlan(site, **formats, errors=own.errors, merged=own.lora == "merged"))
    return SiteTable(next(iter(sites.values())), tuple(plans), ())


def acts_on(kind: str, site: Injection) -> bool:
    """Return whether what is done to a site is for attention, or for anything that holds a weight."""
    attends = site.kv_cache is not None or any(error.point in ("scores", "values") for error in site.errors)
    return attends == (kind == "attention")


def data(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return normal numbers in float64, the same at each call."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def linear_of(weight: Tensor, like: Any = None) -> Any:
    """Return a linear layer of this weight [out, in], without bias; of the class of `like` if that stores [in, out]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False) if like is None else type(like)(*weight.shape)
    made.double()
    with torch.no_grad():
        made.weight.copy_(weight if like is None else weight.mT)
    return made


def small_adapter(like: Any) -> Any:
    """Return peft's layer with its rank and scaling, over a small layer."""
    made, name = deepcopy(like), next(iter(like.lora_A))
    rank = made.lora_A[name].weight.shape[0]
    w, a, b = data((ROWS, WIDTH), (rank, WIDTH), (ROWS, rank))
    made.base_layer, made.fan_in_fan_out = linear_of(w), False
    made.lora_A[name], made.lora_B[name] = linear_of(a), linear_of(b)
    return made.eval()


def layers_above(module: Any) -> Iterator[Any]:
    """Yield peft's layers of stacked experts, from the outermost on."""
    while hasattr(module, "parameter_name"):
        yield module
        module = module.base_layer


class Alone(nn.Module):
    """A model of one module, with the configuration by which `walk` knows it."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = config
        self.module = module


def small(kind: Kind, **changes: Any) -> Alone:
    """Return a small module of the class that a kind has in its model, at random; `changes` of its configuration."""
    config = deepcopy(kind.model.config.get_text_config())
    known = {name: size for name, size in _SIZES.items() if getattr(config, name, None) is not None}
    for name, value in (known | changes).items():
        setattr(config, name, value)
    made = type(kind.like)(config, *([0] if kind.attends else []))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.double().parameters():
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64, generator=generator) * 0.2)
    outermost = deepcopy(kind.outermost) if kind.adapters else made
    for layer in layers_above(outermost):
        name, (_, rows, columns) = next(iter(layer.lora_A)), getattr(made, layer.parameter_name).shape
        out, wide = (rows, columns) if layer._did_swap_in_out_features else (columns, rows)
        rank, layer.num_experts = layer.r[name], EXPERTS
        layer.lora_A[name], layer.lora_B[name] = map(linear_of, data((EXPERTS * rank, wide), (out, rank * EXPERTS)))
        if not hasattr(layer.base_layer, "parameter_name"):
            layer.base_layer = made
    return Alone(outermost.eval(), config)
