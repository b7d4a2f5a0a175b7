"""Resolve model and spec to the site table: what acts where, and why not elsewhere. No weight is changed or read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fp4rl.inject import validate
from fp4rl.inject.adapted import adapter_of
from fp4rl.inject.plan import LeftOut, SitePlan, SiteTable
from fp4rl.sites.walk import OTHER_MODALITY, PARTS, Kind, Site, layer_count, layer_of, plain_name, walk
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS, LINEAR_POINTS
from fp4rl.spec.targets import LEFT_BY_DEFAULT, Targets, require_hit

_WEIGHTS = ("linear", "experts", "router", "adapter")
_ERROR_KINDS: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(("matmul", "input", "weight"), ("linear", "experts")),
    **dict.fromkeys(("scores", "values"), ("attention",)),
}
_LM_HEAD = "TRL's training forward reads this weight without calling the layer"


def resolve(model: nn.Module, injection: Injection) -> SiteTable:
    """Make the table of one injection on one model, which may be on the meta device.

    Raises NotFoundError for a pattern that matches nothing (naming the nearest sites), InvalidValueError for a wanted
    site that cannot or must not be rounded, for fused groups that disagree, and for a setting without effect.
    """
    sites = walk(model)
    if injection.is_nothing:
        return SiteTable(injection, (), tuple(LeftOut(site, "nothing is injected") for site in sites))
    _require_hits(sites, injection)
    layers = layer_count(sites)
    plans, left_out = [], []
    for site in sites:
        reason = _why_left(site, _kinds(injection), injection.targets, layers)
        plan = _plan(site, model, injection, layers, taken=reason is None)
        if plan.acts:
            plans.append(plan)
        else:
            left_out.append(LeftOut(site, reason or _nothing_here(site)))
    _require_every_setting(plans, left_out, injection)
    if not plans:
        reasons = sorted({left.reason for left in left_out if left.site.kind in _WEIGHTS})
        why = "; ".join(reasons) or "the model has no linear layers"
        raise NotFoundError(f"nothing to inject in {type(model).__name__}: {why}")
    validate.require_shared_factors(plans)
    if injection.fused_groups == "agree":
        validate.require_agreement(plans, left_out)
    return SiteTable(injection, tuple(plans), tuple(left_out))


def _kinds(injection: Injection) -> tuple[str, ...]:
    return (*_WEIGHTS, "attention") if injection.kv_cache else _WEIGHTS


def _require_hits(sites: tuple[Site, ...], injection: Injection) -> None:
    """Raise NotFoundError for a pattern of the user that matches nothing; those of the default `leave` may."""
    reached = [site for site in sites if site.kind in _kinds(injection)]
    for pattern in injection.targets.take:
        _require_hit(pattern, reached, "layer that can be rounded")
    for row in injection.by_pattern:  # a rule that leaves sites out may name any
        _require_hit(row.pattern, reached if row.formats else sites, "layer that can be rounded")
    for error in injection.errors:
        kinds = _ERROR_KINDS[error.point]
        for pattern in error.targets.take:
            _require_hit(pattern, [site for site in sites if site.kind in kinds], f"{kinds[0]} site")
    for targets in (injection.targets, *(error.targets for error in injection.errors)):
        for pattern in (p for p in targets.leave if p not in LEFT_BY_DEFAULT):
            _require_hit(pattern, sites, "site")


def _require_hit(pattern: str, sites: Sequence[Site], what: str) -> None:
    """Take plain names and wrapped ones: users of `named_modules()` may write either."""
    if not any(site.is_meant_by(pattern) for site in sites):
        if pattern in PARTS:
            present = ", ".join(sorted({site.part for site in sites if site.part}))
            raise NotFoundError(f"no {what} is in the part {pattern!r} of this model; its parts with one: {present}")
        require_hit(pattern, [name for site in sites for name in site.names], what)


def _why_left(site: Site, kinds: tuple[str, ...], targets: Targets, layers: int) -> str | None:
    """Return why targets leave a site out, None where they take it. Raises where a taken site must not be rounded."""
    if site.kind not in kinds:
        return f"{site.kind}: no point of an injection"
    if site.role == OTHER_MODALITY:
        return "no text passes through it (vision, audio, projector)"
    if site.role == "dt_proj":
        return "its weight is read without calling the layer"
    reasons = [targets.why_left(name, site.role, site.part) for name in site.names]
    left = next((reason for reason in reasons if reason and reason.startswith("left")), None)
    if left or None not in reasons:
        return left or reasons[0]
    numbers = targets.layer_numbers(layers)
    if numbers is not None and site.layer not in numbers:
        return "not in layers" if site.layer is not None else "outside the layers"
    validate.require_opt_in(site, targets)
    return None


def _plan(site: Site, model: nn.Module, injection: Injection, layers: int, *, taken: bool) -> SitePlan:
    errors = tuple(error for error in injection.errors if _reaches(error, site, layers))
    if not (taken or errors):
        return SitePlan(site)
    module = model.get_submodule(site.path)
    validate.require_class_forward(site, module)
    if site.kind == "attention":
        cache = injection.kv_cache if taken else None
        validate.require_eager_attention(site, module, cached=cache is not None)
        return SitePlan(site, kv_cache=cache, errors=errors)
    layers_too = [f"layer {layer_of(plain_name(path))}" for path in site.also]
    note = f"one weight with {', '.join(layers_too)}" if layers_too else _LM_HEAD if site.role == "lm_head" else ""
    plan = SitePlan(site, errors=errors, note=note)
    if taken:
        plan = SitePlan(site, **_formats(site, injection), errors=errors, note=plan.note)
        validate.require_change(plan, module, injection)
    if site.kind == "experts" and plan.acts:
        validate.require_layout(site, module)
        validate.require_reachable_experts(plan, module)
        if hasattr(module, "_is_expert_parallel"):  # else the class computes them in one way of its own
            how: Any = module.config
            plan = replace(plan, note=f"computed by {how._experts_implementation}")
    elif plan.acts:
        validate.require_plain_linear(plan.site, module)
    return _with_adapters(plan, model, injection)


def _reaches(error: HardwareError, site: Site, layers: int) -> bool:
    kinds = _ERROR_KINDS[error.point]
    return site.kind in kinds and _why_left(site, kinds, error.targets, layers) is None


def _formats(site: Site, injection: Injection) -> dict[str, Any]:
    formats = {point: getattr(injection, point) for point in (*LINEAR_POINTS, *GRADIENTS)}
    exception = next((row for row in injection.by_pattern if site.is_meant_by(row.pattern)), None)
    changes = {point: getattr(exception, point, "keep") for point in LINEAR_POINTS}
    return formats | {point: fmt for point, fmt in changes.items() if fmt != "keep"}


def _with_adapters(plan: SitePlan, model: nn.Module, injection: Injection) -> SitePlan:
    """Return the plan adjusted for adapters and frozen weights: merged, packed, or without gradient formats."""
    adapter = adapter_of(model, plan.site)
    if plan.acts and plan.site.kind != "experts":
        validate.require_own_weight(plan.site, adapter)
    frozen = not getattr(model.get_submodule(plan.site.path), plan.site.parameter or "weight").requires_grad
    merged = injection.lora == "merged" and adapter is not None and plan.weight is not None
    if merged:
        validate.require_mergeable(plan, adapter)
    elif plan.weight is not None:
        validate.require_no_norm(plan, adapter)
    packed = injection.frozen_base == "packed" and frozen and plan.weight is not None
    if packed:
        validate.require_packable(plan)
    grad_weight = None if frozen and not merged else plan.grad_weight
    plan = replace(plan, merged=merged, packed=packed, grad_weight=grad_weight)
    if merged or packed:
        validate.require_one_place(plan)
    return plan


def _require_every_setting(plans: list[SitePlan], left_out: list[LeftOut], injection: Injection) -> None:
    """Raise InvalidValueError for a setting that reached no site: it would silently have no effect."""
    for setting, described, at_a_site, why in (
        ("lora: merged", injection.lora == "merged", "merged", "no adapted layer is taken"),
        ("frozen_base: packed", injection.frozen_base == "packed", "packed", "no taken weight is frozen"),
        ("kv_cache", injection.kv_cache, "kv_cache", f"{_why_no_cache(left_out)}; leave it out"),
        ("grad_weight", injection.grad_weight, "grad_weight", "every taken weight is frozen"),
        ("grad_input", injection.grad_input, "grad_input", "no linear layer is taken"),
    ):
        if described and not any(getattr(plan, at_a_site) for plan in plans):
            raise InvalidValueError(f"{setting} would do nothing: {why}")
    for row in injection.by_pattern:
        if row.formats and not any(plan.site.is_meant_by(row.pattern) for plan in plans):
            why = next(left.reason for left in left_out if left.site.is_meant_by(row.pattern))
            raise InvalidValueError(f"by_pattern: {row.pattern!r} would do nothing: {why}")
    for wanted in injection.targets.opt_in:
        if not any(wanted in (plan.site.kind, plan.site.role) for plan in plans):
            raise InvalidValueError(f"targets.opt_in: [{wanted}] would do nothing: no {wanted} is taken")
    for error in injection.errors:
        if not any(error in plan.errors for plan in plans):
            raise NotFoundError(f"{error.name} reaches no site: its targets leave every one out")


def _why_no_cache(left_out: list[LeftOut]) -> str:
    left = next((left for left in left_out if left.site.kind == "attention"), None)
    if left is not None:
        return f"{left.site.name} is {left.reason}"
    return "no layer has projections of keys and values (k_proj and v_proj, qkv_proj, ...), state spaces keep a state"


def _nothing_here(site: Site) -> str:
    return "attention: no kv_cache, no error" if site.kind == "attention" else "by_pattern leaves every point as it is"
