"""Refuse what must not or cannot be rounded, with the cure for each; used by `resolve` only."""

import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import skip_init

from fp4rl.inject.attention import EXPANDS
from fp4rl.inject.plan import LeftOut, SitePlan
from fp4rl.inject.site import runs_its_class
from fp4rl.sites.walk import Site, is_conv1d, plain_name
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E8M7, Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.targets import Targets

_CALLED = {"lm_head": "the output head", "router": "a router", "adapter": "an adapter"}
_LEAVE = {"lm_head": "*lm_head*", "adapter": "*lora_*"}
_REACHED = ("eager", "grouped_mm", "batched_mm")  # all others are kernels that read the weight themselves


def require_opt_in(site: Site, targets: Targets) -> None:
    """Raise InvalidValueError for a router, adapter or output head without opt-in, and for a shared weight."""
    wanted = "lm_head" if site.role == "lm_head" else site.kind
    if wanted in _CALLED and wanted not in targets.opt_in:
        pattern = _LEAVE.get(wanted) or _everywhere(site.name)
        raise InvalidValueError(
            f"{site.name} is {_CALLED[wanted]}, which no engine rounds; leave it ({pattern!r} in targets.leave), or "
            f"{'where it is a linear layer ' if wanted == 'router' else ''}write targets.opt_in: [{wanted}]"
        )
    if site.shares is not None:
        raise InvalidValueError(
            f"{site.name} shares its weight with {site.shares}, so rounding one would not be what is served; "
            + (
                f"take {wanted} out of targets.opt_in"
                if wanted in _CALLED
                else f"leave it: targets.leave: [{site.name}]"
            )
        )


def _everywhere(name: str) -> str:
    """Return the pattern that matches a site in every layer."""
    return re.sub(r"^.*?\.\d+\.", "*.", name)


def require_plain_linear(site: Site, module: nn.Module) -> None:
    """Raise InvalidValueError for a linear layer with a forward of its own, or with a computed weight."""
    if site.kind == "router" and not isinstance(module, nn.Linear):
        raise InvalidValueError(
            f"{site.name} is a {type(module).__name__}, no linear layer to round; take router out of targets.opt_in"
        )
    if site.parameter is None:
        raise InvalidValueError(
            f"{site.name} has no weight of its own (parametrized, or sharded already); attach before"
        )
    if not (is_conv1d(module) or (isinstance(module, nn.Linear) and _is_linear(type(module)))):
        raise InvalidValueError(
            f"{site.name} is a {type(module).__name__} with a forward of its own, not x W^T + b, which injection would "
            f"bypass; leave it out: targets.leave: ['{_everywhere(site.name)}']"
        )


def _is_linear(kind: type[nn.Linear]) -> bool:
    """Return whether a class of linear layers computes x W^T + b, in a forward of its own too (FalconLinear): tried."""
    if kind.forward is nn.Linear.forward or kind.__init__ is not nn.Linear.__init__:
        return kind.forward is nn.Linear.forward
    layer: Any = skip_init(kind, 3, 2, dtype=torch.float64)  # type: ignore[no-untyped-call]
    numbers = torch.arange(12, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(numbers[:6].view(2, 3).square())
        layer.bias.copy_(numbers[:2])
        x = numbers.view(2, 2, 3)
        return torch.equal(layer(x), linear(x, layer.weight, layer.bias))


def require_class_forward(site: Site, module: nn.Module) -> None:
    """Raise InvalidValueError for a module whose call does not run its class's forward."""
    if not runs_its_class(module):
        raise InvalidValueError(
            f"{site.name} has a forward set on the instance, so a swapped class would never run; "
            f"delete it, or leave the site out: targets.leave: [{site.name}]"
        )


def require_change(plan: SitePlan, module: nn.Module, injection: Injection) -> None:
    """Raise InvalidValueError for a format that can hold every value of its input's dtype: it would change nothing."""
    if plan.site.parameter is None:
        return
    own = str(getattr(module, plan.site.parameter).dtype).removeprefix("torch.")
    for point in plan.points():
        fmt = getattr(plan, point)
        if fmt.scale == "none" and fmt.element == E8M7 and own == injection.dtype == "bfloat16":
            raise InvalidValueError(f"{plan.name}: {point}: {fmt.name} changes nothing in a {own} model; write none")


def require_reachable_experts(plan: SitePlan, module: nn.Module) -> None:
    """Raise InvalidValueError for formats and errors in a matmul of stacked experts that cannot be intercepted."""
    points = [point for point in plan.points() if point != "weight"]
    points += [error.name for error in plan.errors if error.point != "weight"]
    by_rows = [error.name for error in plan.errors if error.backward] + ["grad_weight"] * (plan.grad_weight is not None)
    how = getattr(getattr(module, "config", None), "_experts_implementation", "eager") or "eager"
    if points and how not in _REACHED:
        raise InvalidValueError(
            f"{plan.name}: the {points[0]} of stacked experts is out of reach in the implementation {how!r}; "
            "take grouped_mm (model.experts_implementation), or round their weights alone"
        )
    if by_rows and how == "batched_mm":
        raise InvalidValueError(
            f"{plan.name}: {by_rows[0]}: the implementation 'batched_mm' gives each row a matrix of its own, so no "
            f"matmul of {type(module).__name__} sums over rows; take grouped_mm (model.experts_implementation)"
        )
    if plan.output is not None and getattr(module, f"{plan.site.parameter}_bias", None) is not None:
        raise InvalidValueError(
            f"{plan.name}: {type(module).__name__} adds a bias after its matmul, so what an expert returns is out of "
            f"reach; round no output there: by_pattern: {{'{_everywhere(plan.site.parent)}.*': {{output: none}}}}"
        )


def require_own_weight(site: Site, adapter: nn.Module | None) -> None:
    """Raise InvalidValueError for a linear layer whose weight peft replaces by a sum (`target_parameters`)."""
    if hasattr(adapter, "parameter_name"):
        raise InvalidValueError(
            f"{site.name}: peft's target_parameters puts a sum in the place of this linear layer's weight; name the "
            f"layer in target_modules: [{site.name.rpartition('.')[2]}], and stacked experts alone in target_parameters"
        )


def require_layout(site: Site, module: nn.Module) -> None:
    """Raise InvalidValueError for experts whose shape tells neither their parts nor the axis that is summed over."""
    kind, shape = type(module).__name__, list(site.shape)
    if len(shape) == 2:
        raise InvalidValueError(
            f"{site.name}: {kind} holds all its experts in one matrix {shape}, whose parts injection cannot tell "
            f"apart; leave them out: targets.leave: ['{_everywhere(site.parent)}.*']"
        )
    if site.transposed is None and shape[1] != shape[2]:
        raise InvalidValueError(
            f"{site.name}: nothing in {kind} tells which axis of {shape} its matmul sums over, so along which its "
            f"blocks run; leave it out: targets.leave: [{site.name}]"
        )


def require_eager_attention(site: Site, module: nn.Module, *, cached: bool) -> None:
    """Raise InvalidValueError where attention runs in a kernel whose keys, values and products cannot be reached.

    With `cached`, also where a latent vector is cached that the class expands to keys and values out of reach.
    """
    how = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa") or "sdpa"
    if how not in ("sdpa", "eager"):
        raise InvalidValueError(f"{site.name}: attention runs in {how!r}, out of reach; load the model with 'sdpa'")
    if cached and hasattr(module, "kv_b_proj") and not hasattr(module, EXPANDS):
        raise InvalidValueError(
            f"{site.name}: {type(module).__name__} caches one latent vector for all heads (MLA) and expands it out of "
            f"reach, in no method {EXPANDS}; leave it out: targets.leave: [{site.name}]"
        )


def require_agreement(plans: list[SitePlan], left_out: list[LeftOut]) -> None:
    """Raise InvalidValueError when q/k/v or gate/up differ: a serving engine runs them as one matmul in one format."""
    groups: dict[str, dict[str, tuple[Format | None, ...]]] = defaultdict(dict)
    formats = [(plan.site, (plan.weight, plan.input)) for plan in plans]
    for site, pair in formats + [(left.site, (None, None)) for left in left_out]:
        if site.fused_group is not None and site.kind == "linear":
            groups[site.fused_group][site.name] = pair
    for members in groups.values():
        if len(set(members.values())) > 1:
            words = {name: "/".join(map(_with_factor, pair)) for name, pair in members.items()}
            listed = ", ".join(f"{name}: {pair}" for name, pair in words.items())
            raise InvalidValueError(f"a serving kernel fuses these, which must agree: {listed} (or fused_groups: free)")


def _with_factor(fmt: Format | None) -> str:
    if fmt is None:
        return "none"
    return fmt.name + ("" if fmt.factor == "tensor" else f" ({fmt.factor} factor)")


def require_shared_factors(plans: list[SitePlan]) -> None:
    """Raise InvalidValueError for codes whose factor depends on a weight that is trained, and for gate and up of
    experts in two stacks, whose pairs share no factor here."""
    groups: dict[str, list[SitePlan]] = defaultdict(list)
    for plan in plans:
        if plan.weight is not None and plan.weight.factor == "fused" and plan.site.fused_group is not None:
            groups[plan.site.fused_group].append(plan)
    for group, members in groups.items():
        stacks = [plan.name for plan in members if plan.site.kind == "experts"]
        if len(stacks) > 1:
            raise InvalidValueError(
                f"{' and '.join(stacks)} are fused when they are served, and lie in two stacks, for which no common "
                "factor is computed; take MXFP4 for them, or leave them out: by_pattern: {experts: none}"
            )
        if len({plan.packed for plan in members}) == 1:
            continue
        raise InvalidValueError(
            f"{group}: frozen_base: packed stores codes under one factor for the group, of which a part is trained; "
            "freeze or train all of it, or take frozen_base: copy"
        )


def require_mergeable(plan: SitePlan, adapted: nn.Module) -> None:
    """Raise InvalidValueError for an adapter that computes anything else than (W + sBA) x, such as DoRA."""
    dropout = [m.p for m in adapted.lora_dropout.modules() if isinstance(m, nn.Dropout) and m.p > 0]  # type: ignore[union-attr]
    for holds, reason in (
        (dropout, "its dropout acts on the adapter's input alone; set lora_dropout=0"),
        (getattr(adapted, "lora_variant", None), "it is a variant (DoRA or the like), no plain sum; use plain LoRA"),
        (any(getattr(adapted, "lora_bias", {}).values()), "its adapter has a bias; use lora_bias=False"),
    ):
        if holds:
            raise InvalidValueError(f"{plan.name}: lora: merged cannot round this adapter: {reason}")


def require_no_norm(plan: SitePlan, adapted: Any) -> None:
    """Raise InvalidValueError for DoRA beside a rounded weight: it divides by the norm of the unrounded one."""
    if getattr(adapted, "lora_magnitude_vector", None):
        raise InvalidValueError(
            f"{plan.name}: DoRA divides by the norm of the unrounded weight plus its adapter, which is not what is "
            "served; use plain LoRA (use_dora=False), or round no weight there"
        )


def require_one_place(plan: SitePlan) -> None:
    """Raise InvalidValueError for a weight that several layers share, where each would need one of its own."""
    if plan.site.also:
        kind = "lora: merged" if plan.merged else "frozen_base: packed"
        cure = "lora: adapter" if plan.merged else "frozen_base: copy"
        raise InvalidValueError(
            f"{plan.name}: {kind} needs a weight for each layer, and {plain_name(plan.site.also[0])} shares this one; "
            f"take {cure}"
        )


def require_packable(plan: SitePlan) -> None:
    """Raise InvalidValueError for a weight or a format that has no packed layout."""
    fmt, experts = plan.weight, plan.site.kind == "experts"
    if plan.site.transposed and not experts:
        raise InvalidValueError(
            f"{plan.name}: frozen_base: packed unpacks no weight stored [in, out] (Conv1D); take frozen_base: copy"
        )
    if plan.site.transposed is None:
        raise InvalidValueError(
            f"{plan.name}: frozen_base: packed keeps no weight to find out by how this square one is stored; take "
            f"frozen_base: copy, or leave it out: targets.leave: ['{_everywhere(plan.name)}']"
        )
    if fmt is not None and (fmt.element.bits != 4 or fmt.rounding == "stochastic"):
        raise InvalidValueError(f"{plan.name}: frozen_base: packed stores 4-bit codes drawn once, not {fmt.name}")
