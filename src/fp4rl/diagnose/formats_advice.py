"""Advice on formats: the best ones for each site by a knapsack on KL, and what another scale rule would save."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.estimate import estimated_kl
from fp4rl.diagnose.precision import PIECE, weights_of
from fp4rl.diagnose.prices import Pair, computes, pairs_of, prices_of
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.sensitivity import divergences
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.numerics.errors import ErrorSums, round_piece
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import BF16, Format, ScaleRule
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import PatternFormats

_RULES: tuple[ScaleRule, ...] = ("floor", "even", "mse")
BUCKETS = 1 << 16  # steps of the budget; costs are rounded up to whole steps, so that the budget is never exceeded


@dataclass(frozen=True)
class Budget:
    """An average price in bits a weight, of which the share `compute` is by the time of matmuls (see `prices`)."""

    bits: float = 4.5
    compute: float = 0.5


@dataclass(frozen=True)
class Choice:
    """Formats for one group: the weight's by name, the price in bits, and the KL that remains, in nats per token."""

    format: str
    bits: float
    kl: float
    pair: Pair | None = None


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
    """The chosen formats of each group of sites (fused groups stay together), the average bits per weight, and how many
    times as long the matmuls take as they do as scanned, with the source of their rates."""

    chosen: Chosen
    groups: Mapping[str, tuple[str, ...]]
    bits_per_weight: float
    slowdown: float
    rates: str

    def wider(self, injection: Injection) -> dict[str, Pair]:
        """Return site -> its formats, where they are others than the injection's own."""
        own = Pair(injection.weight, injection.input)
        choices = self.chosen.choices.items()
        return {
            site: choice.pair
            for group, choice in choices
            if choice.pair is not None and choice.pair != own
            for site in self.groups[group]
        }

    def exceptions(self, injection: Injection) -> tuple[PatternFormats, ...]:
        """Return an exception for each site with other formats than the injection's own; BF16 means no rounding."""
        return tuple(
            PatternFormats(
                pattern=site,
                weight="keep" if pair.weight == injection.weight else pair.weight,
                input="keep" if pair.input == injection.input else pair.input,
            )
            for site, pair in self.wider(injection).items()
        )


def advised_formats(
    model: nn.Module, report: ScanReport, calibration: Calibration, settings: Budget, generator: torch.Generator
) -> FormatAdvice:
    """Choose for least predicted KL within a budget: as scanned, wider inputs where the deployment computes that mode,
    MXFP8 or BF16.

    The KL of wider formats is that of the scanned ones, times the ratio of their estimates by backward passes over the
    same answers. Raises InvalidValueError without a sensitivity scan, and for a budget below the scanned format's bits.
    """
    if report.sensitivity is None:
        raise InvalidValueError("formats are advised from sensitivity; scan with it")
    table, injection = report.table, report.table.injection
    plans = [plan for plan in table.plans if plan.weight is not None]
    if injection.weight is None or not plans:
        raise InvalidValueError("no weight is rounded in this scan; scan a mode that rounds weights, such as w4a16")
    own, *wider = pairs_of(injection)
    kl = {own: {site.name: site.kl for site in report.sensitivity.sites}}
    state = generator.get_state()
    narrow = estimated_kl(model, table, calibration, generator=generator)
    for pair in wider[:-1]:
        generator.set_state(state)
        changed = _in(table, pair)
        wide = estimated_kl(model, changed, calibration, generator=generator)
        stacks = [plan for plan in changed.plans if plan.name not in narrow]  # experts are measured, by a pass each
        measured = divergences(model, [replace(changed, plans=(plan,)) for plan in stacks], calibration)
        ratios = {site: _ratio(wide[site], narrow[site]) for site in narrow}
        kl[pair] = {site: kl[own][site] * ratio for site, ratio in ratios.items()}
        kl[pair] |= {plan.name: max(0.0, each.kl) for plan, each in zip(stacks, measured, strict=True)}
    kl[wider[-1]] = dict.fromkeys(kl[own], 0.0)
    groups, by_name = fused_groups(plans), {plan.name: plan for plan in plans}
    prices = prices_of(model, plans, injection, settings.compute)
    # What was scanned is taken as it is, and MXFP8 weights and BF16 are left to whoever serves them.
    offered = {
        group: [
            pair
            for pair in kl
            if pair in (own, *wider[-2:]) or all(computes(injection.deployment, pair, by_name[s]) for s in sites)
        ]
        for group, sites in groups.items()
    }
    choices = {
        group: [
            Choice(_name(pair), sum(prices.of(pair, s) for s in sites), sum(kl[pair][s] for s in sites), pair)
            for pair in offered[group]
        ]
        for group, sites in groups.items()
    }
    chosen = knapsack(choices, settings.bits * prices.total)
    taken = {site: choice.pair or own for group, choice in chosen.choices.items() for site in groups[group]}
    bits = sum(prices.sizes[site] * pair.weight_bits for site, pair in taken.items()) / prices.total
    time = sum(prices.macs[site] * prices.slowdown(pair, site) for site, pair in taken.items())
    return FormatAdvice(chosen, groups, bits, time, prices.source)


def _name(pair: Pair) -> str:
    return pair.weight.name if pair.weight is not None else BF16.name


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


def _ratio(wide: float, narrow: float) -> float:
    return min(1.0, wide / narrow) if narrow > 0 else 0.0


def _in(table: SiteTable, pair: Pair) -> SiteTable:
    """Return the table with every site in these formats where it is rounded, as the scanned deployment rounds them."""
    injection, name = table.injection, table.injection.deployment

    def at(point: str, own: Format | None, fmt: Format | None, scanned: Format | None) -> Format | None:
        if own is None or fmt is None or fmt == scanned:
            return own if fmt == scanned else None
        return deployment_named(name).at(point, fmt) if name else fmt

    plans = (
        replace(
            p,
            weight=at("weight", p.weight, pair.weight, injection.weight),
            input=at("input", p.input, pair.input, injection.input),
        )
        for p in table.plans
    )
    return replace(table, plans=tuple(plans))


def fused_groups(plans: Sequence[SitePlan]) -> dict[str, tuple[str, ...]]:
    """Return groups of sites: those that a serving kernel fuses together, every other site alone."""
    groups: dict[str, list[str]] = {}
    for plan in plans:
        groups.setdefault(plan.site.fused_group or plan.name, []).append(plan.name)
    return {group: tuple(sites) for group, sites in groups.items()}
