"""Find the weights that take noise, each with its layer and its multiplier; nothing is changed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fp4rl.noise.gain import NormGauge
from fp4rl.noise.schedule import multiplier_at, require_layers
from fp4rl.sites.walk import OTHER_MODALITY, Site, layer_count, walk
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.noise import Noise, NoiseTargets
from fp4rl.spec.targets import matches, require_hit

_QK_NORM = re.compile(r"(^|_)(q|k|query|key)_?(layer)?norm$")
_BEFORE_EXPERTS = ("post_attention", "pre_feedforward", "pre_mlp", "ffn_norm")


@dataclass(frozen=True)
class NoisyWeight:
    """One weight that takes noise. `name` is free of wrappers, `layer` None outside the layers; norms have a gauge."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    kind: Literal["norm", "linear"]
    layer: int | None
    multiplier: float
    gauge: NormGauge | None = None

    @property
    def offset(self) -> float:
        """What the layer adds to the weight before it multiplies by it."""
        return 0.0 if self.gauge is None else self.gauge.offset


def noisy_weights(model: nn.Module, noise: Noise, *, share: float | None = None) -> tuple[NoisyWeight, ...]:
    """Return every weight that `noise` names, in the model's order; a weight that two modules share is listed once.

    Raises NotFoundError without any weight or for a `leave` pattern without a match, InvalidValueError for layers that
    the model does not have.
    """
    sites = walk(model)
    layers = layer_count(sites)
    require_layers(noise.multipliers, layers)
    weights = []
    for site, kind in _candidates(model, sites, noise.targets):
        module = model.get_submodule(site.path)
        factor = multiplier_at(noise.multipliers, site.layer, layers, share)
        parameter = module.get_parameter(str(site.parameter))
        name = f"{site.name}.weight" if site.parameter == "weight" else site.name
        gauge = NormGauge(module, site.name) if kind == "norm" else None
        weights.append(NoisyWeight(name, module, parameter, kind, site.layer, factor, gauge))
    for pattern in noise.targets.leave:
        require_hit(pattern, [weight.name for weight in weights], "weight that would take noise")
    weights = [weight for weight in weights if not any(matches(weight.name, p) for p in noise.targets.leave)]
    if not weights:
        raise NotFoundError(
            f"no weight of {type(model).__name__} takes noise under targets.kinds={list(noise.targets.kinds)}; "
            "a norm is known by RMSNorm or LayerNorm in its class name and a weight of one dimension; take "
            "noise.targets.kinds: [linear], or leave noise out"
        )
    return tuple(weights)


def no_noise_on_codes(name: str) -> str:
    """Return why the weight of that name takes no noise while it is packed, with the cure."""
    return (
        f"noise: {name} is packed into 4-bit codes (injection.frozen_base), which hold no noise; take frozen_base: "
        "copy, or noise.targets.kinds: [norm]"
    )


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by its name and shape, since every model family has a class of its own."""
    named = any(word in type(module).__name__ for word in ("RMSNorm", "LayerNorm"))
    weight = getattr(module, "weight", None)
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _candidates(
    model: nn.Module, sites: tuple[Site, ...], targets: NoiseTargets
) -> Iterator[tuple[Site, Literal["norm", "linear"]]]:
    with_experts = {site.layer for site in sites if "experts" in site.name.split(".")}
    for site in sites:
        # peft keeps an unused original beside a module that it saves whole
        other = site.role == OTHER_MODALITY or "original_module" in site.path.split(".")
        if site.parameter is None or site.shares is not None or other:
            continue
        if site.kind == "norm" and "norm" in targets.kinds and is_norm(model.get_submodule(site.path)):
            if _norm_wanted(site, targets, with_experts):
                yield site, "norm"
        elif (
            site.kind in ("linear", "experts") and "linear" in targets.kinds and site.role not in ("lm_head", "router")
        ):
            yield site, "linear"


def _norm_wanted(site: Site, targets: NoiseTargets, with_experts: set[int | None]) -> bool:
    last = site.name.rpartition(".")[2]
    if site.layer is None:
        return targets.final_norm
    if _QK_NORM.search(last):
        return targets.qk_norms
    if site.layer in with_experts and targets.moe == "post_attention":
        return any(word in last for word in _BEFORE_EXPERTS)
    return True
