"""Advice on formats: the best format for each site by a knapsack on KL, and what another scale rule would save."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.estimate import estimated_kl
from fp4rl.diagnose.precision import PIECE, weights_of
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.sensitivity import divergences
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.numerics.errors import ErrorSums, round_piece
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import BF16, MXFP8, Format, ScaleRule
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import PatternFormats

WIDER: tuple[Format, ...] = (MXFP8, BF16)
_RULES: tuple[ScaleRule, ...] = ("floor", "even", "mse")
BUCKETS = 1 << 16  # steps of the budget; costs are rounded up to whole steps, so that the budget is never exceeded


@dataclass(frozen=True)
class Choice:
    """A format for one group: its cost in bits, and the KL that remains, in nats per token."""

    format: str
    bits: float
    kl: float


@dataclass(frozen=True)
class Chosen:
    """One choice per group, with their sums."""

    choices: Mapping[str, Choice]
    bits: float
    kl: float


def knapsack(groups: Mapping[str, Sequence[Choice]], budget_bits: float) -> Chosen:
    """Take one choice from every group so that the bits fit `budget_bits` and the sum of the KLs is minimal.

    Dynamic programming, since the solver of `scipy.optimize.milp` at times prints to standard output, into the JSON.
    Raises InvalidValueError, naming the least budget, when even the cheapest choices do not fit.
    """
    floors = [min(choice.bits for choice in choices) for choices in groups.values()]
    spare = budget_bits - sum(floors)
    if spare < -1e-9 * budget_bits:
        least = f"{sum(floors):.6g} bits"
        raise InvalidValueError(f"the cheapest formats need {least}, but the budget is {budget_bits:.6g}; raise it")
    step = max(spare, 1e-9 * budget_bits) / BUCKETS
    best = np.zeros(BUCKETS + 1)  # least KL of the groups so far, by the steps of the budget that they may use
    picks = []
    for choices, floor in zip(groups.values(), floors, strict=True):
        options = np.full((len(choices), BUCKETS + 1), np.inf)
        costs = [int(np.ceil((choice.bits - floor) / step - 1e-9)) for choice in choices]
        for row, choice, cost in zip(options, choices, costs, strict=True):
            row[cost:] = best[: max(BUCKETS + 1 - cost, 0)] + choice.kl
        best = options.min(0)
        picks.append((options.argmin(0).astype(np.int8), costs))
    at, chosen = int(best.argmin()), dict[str, Choice]()
    for name, (pick, costs) in zip(reversed(list(groups)), reversed(picks), strict=True):
        chosen[name] = groups[name][pick[at]]
        at -= costs[pick[at]]
    ordered = {name: chosen[name] for name in groups}
    return Chosen(ordered, sum(c.bits for c in ordered.values()), sum(c.kl for c in ordered.values()))


@dataclass(frozen=True)
class FormatAdvice:
    """The chosen format of each group of sites (fused groups stay together), and the average bits per weight."""

    chosen: Chosen
    groups: Mapping[str, tuple[str, ...]]
    bits_per_weight: float

    def exceptions(self, injection: Injection) -> tuple[PatternFormats, ...]:
        """Return an exception for each site with another format than the injection's own; BF16 means no rounding."""
        exceptions = []
        for group, choice in self.chosen.choices.items():
            if injection.weight is not None and choice.format != injection.weight.name:
                fmt = next(wide for wide in WIDER if wide.name == choice.format)
                point = None if fmt is BF16 else fmt
                inputs = point if injection.input is not None else "keep"
                exceptions += [PatternFormats(pattern=s, weight=point, input=inputs) for s in self.groups[group]]
        return tuple(exceptions)


def advised_formats(
    model: nn.Module, report: ScanReport, calibration: Calibration, bits_per_weight: float, generator: torch.Generator
) -> FormatAdvice:
    """Choose among the scanned format, MXFP8 and BF16 for least predicted KL at an average of `bits_per_weight`.

    The KL of a wider format is that of the scanned one, times the ratio of their estimates by backward passes. Raises
    InvalidValueError without a sensitivity scan, and for a budget below the scanned format's own bits.
    """
    if report.sensitivity is None:
        raise InvalidValueError("formats are advised from sensitivity; scan with it")
    injection, plans = report.table.injection, [p for p in report.table.plans if p.weight is not None]
    if injection.weight is None or not plans:
        raise InvalidValueError("no weight is rounded in this scan; scan a mode that rounds weights, such as w4a16")
    kl = {site.name: site.kl for site in report.sensitivity.sites}
    widened = _widened(report.table)
    narrow = estimated_kl(model, report.table, calibration, generator=generator)
    wide = estimated_kl(model, widened, calibration, generator=generator)
    stacks = [plan for plan in widened.plans if plan.name not in narrow]  # experts are measured, by a pass each
    tables = [replace(widened, plans=(plan,)) for plan in stacks]
    measured = divergences(model, tables, calibration)
    narrow |= {plan.name: kl[plan.name] for plan in stacks}
    wide |= {plan.name: divergence.kl for plan, divergence in zip(stacks, measured, strict=True)}
    groups = fused_groups(plans)
    size = {plan.name: prod(plan.site.shape) for plan in plans}
    choices = {
        group: _choices(injection.weight, sites, size, kl, {s: _ratio(wide[s], narrow[s]) for s in sites})
        for group, sites in groups.items()
    }
    chosen = knapsack(choices, bits_per_weight * sum(size.values()))
    return FormatAdvice(chosen, groups, chosen.bits / sum(size.values()))


@dataclass(frozen=True)
class Variant:
    """Another way to round the same weights: the relative error of all together, and its change against the present."""

    name: str
    format: Format
    relative_l2: float
    change: float


def weight_variants(model: nn.Module, table: SiteTable) -> tuple[Variant, ...]:
    """Measure other scale rules and a rotation on the first million values of every weight; the best comes first."""
    fmt = table.injection.weight
    if fmt is None:
        return ()
    tried = {"as scanned": fmt}
    if fmt.scale == "e8m0":
        # A tool's own arithmetic is of its own rule.
        exact = replace(fmt, scale_epsilon=0.0, scale_math="exact", scale_min_exponent=None)
        others = (rule for rule in _RULES if rule != fmt.scale_rule)
        tried |= {f"scale_rule: {rule}": replace(exact, scale_rule=rule) for rule in others}
    if fmt.rotation is None:
        tried["rotation: 32"] = replace(fmt, rotation=32)
    plans = [plan for plan in table.plans if plan.weight is not None]
    errors = {name: _error(model, plans, table, variant) for name, variant in tried.items()}
    now = errors["as scanned"]
    variants = [Variant(name, tried[name], error, error / now - 1) for name, error in errors.items() if now > 0]
    return tuple(sorted(variants, key=lambda variant: variant.relative_l2))


def _error(model: nn.Module, plans: Sequence[SitePlan], table: SiteTable, fmt: Format) -> float:
    tally = ErrorSums()
    for weight in (weight for plan in plans for weight in weights_of(model, plan)):
        rows = max(1, PIECE // weight.shape[-1])
        fits = fmt.rotation is None or weight.shape[-1] % fmt.rotation == 0
        seen = weight[:rows].to(getattr(torch, table.injection.dtype))
        tally.add(round_piece(seen, fmt if fits else replace(fmt, rotation=None)))
    return tally.measures()["relative_l2"] if tally.values else float("inf")


def _choices(
    fmt: Format, sites: Sequence[str], size: Mapping[str, int], kl: Mapping[str, float], wider: Mapping[str, float]
) -> list[Choice]:
    values = sum(size[site] for site in sites)
    return [
        Choice(fmt.name, values * fmt.bits_per_value, sum(kl[site] for site in sites)),
        Choice(MXFP8.name, values * MXFP8.bits_per_value, sum(kl[site] * wider[site] for site in sites)),
        Choice(BF16.name, values * 16.0, 0.0),
    ]


def _ratio(wide: float, narrow: float) -> float:
    return min(1.0, wide / narrow) if narrow > 0 else 0.0


def _widened(table: SiteTable) -> SiteTable:
    """Return the table with every site in MXFP8, as the scanned deployment rounds it."""
    name = table.injection.deployment
    at = deployment_named(name).at if name else lambda _point, fmt: fmt
    plans = (
        replace(p, weight=p.weight and at("weight", MXFP8), input=p.input and at("input", MXFP8)) for p in table.plans
    )
    return replace(table, plans=tuple(plans))


def fused_groups(plans: Sequence[SitePlan]) -> dict[str, tuple[str, ...]]:
    """Return groups of sites: those that a serving kernel fuses together, every other site alone."""
    groups: dict[str, list[str]] = {}
    for plan in plans:
        groups.setdefault(plan.site.fused_group or plan.name, []).append(plan.name)
    return {group: tuple(sites) for group, sites in groups.items()}
