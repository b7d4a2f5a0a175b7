"""Calibrate the static factors of inputs: the largest magnitude of each that texts give, as kernels are served with."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.experts import OwnProduct, unpadded, watching
from fp4rl.diagnose.passes import logits_of
from fp4rl.inject.experts import ExpertProduct
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.sites.observe import observe
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.points import LINEAR_POINTS, PatternFormats


def static_factors(model: nn.Module, table: SiteTable, calibration: Calibration) -> dict[str, Any]:
    """Return the fragment that gives the scanned injection a static factor at every input under NVFP4 or FP8.

    Like llm-compressor and ModelOpt, it is the largest magnitude in the unrounded model, over all experts of a stack.
    Raises InvalidValueError where no input has such a factor, and for an input that was never anything but zero.
    """
    plans = {plan.site.path: plan for plan in _of_factors(table) if plan.site.kind == "linear"}
    stacks = [plan for plan in _of_factors(table) if plan.site.kind == "experts"]
    if not plans and not stacks:
        raise InvalidValueError("--calibrate finds factors of inputs under NVFP4 or FP8; scan injection=nvfp4_w4a4")
    largest = _largest(model, plans, stacks, calibration, getattr(torch, table.injection.dtype))
    exceptions = [_static(plan, table, largest[plan.name]) for plan in (*plans.values(), *stacks)]
    own = table.injection.model_copy(update={"by_pattern": (*exceptions, *table.injection.by_pattern)})
    return {"injection": {"mode": own.mode, **own.model_dump(mode="json", exclude_defaults=True)}}


def _of_factors(table: SiteTable) -> Iterator[SitePlan]:
    return (plan for plan in table.plans if plan.input is not None and plan.input.scale in ("e4m3", "fp32"))


def _largest(
    model: nn.Module, plans: dict[str, SitePlan], stacks: list[SitePlan], texts: Calibration, dtype: torch.dtype
) -> dict[str, float]:
    largest: dict[str, float] = defaultdict(float)

    def seen(name: str, tokens: Tensor) -> None:
        if tokens.numel():
            largest[name] = max(largest[name], float(tokens.detach().to(dtype).abs().max()))

    def computed(plan: SitePlan, product: ExpertProduct, _: list[OwnProduct]) -> Tensor:
        seen(plan.name, product.x)
        return product.compute(product.x, product.weight)

    for batch in texts.batches:
        for part in unpadded(batch):  # no padding, which a served model never sees
            with (
                observe(model, plans, on_input=lambda path, x: seen(plans[path].name, x)),
                watching(model, stacks, computed),
            ):
                logits_of(model, part)
    return largest


def _static(plan: SitePlan, table: SiteTable, largest: float) -> PatternFormats:
    """Return the exception of one site: its static input, and what else of it is not the injection's own."""
    if not 0 < largest < float("inf"):
        raise InvalidValueError(f"{plan.name}: its inputs were {largest:g} at most; calibrate on more texts")
    assert plan.input is not None
    static = replace(plan.input, factor="static", calibrated=largest)
    others = {point: getattr(plan, point) for point in LINEAR_POINTS if point != "input"}
    changed = {point: fmt for point, fmt in others.items() if fmt != getattr(table.injection, point)}
    return PatternFormats(pattern=plan.name, input=static, **changed)
