"""What one run shows of its treatment, pooled for a reader: rounding by phase, noise, checks of its weights."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fp4rl.lab.runs import Run
from fp4rl.spec.evidence import Injected, LayerNoise, LiveCheck, MasterCheck, NoiseStages, RolloutNoise, Rounded
from fp4rl.spec.records import HealthSummary, PlannedSite, SiteLeftOut


@dataclass(frozen=True)
class Rounding:
    """One point (weight, input or output) in one phase, over all sites; shares and errors are medians over sites."""

    phase: str
    point: str
    sites: int
    calls: int
    elements: int
    share_changed: float | None
    relative_error: float | None


@dataclass(frozen=True)
class NoiseStep:
    """The noise of one rollout, pooled over layers: standard deviation asked and realised, share of weights changed."""

    step: int
    asked: float
    realised: float | None
    share_changed: float


@dataclass(frozen=True)
class RunEvidence:
    """What a run recorded. None stands for what it did not record, never for a good result."""

    sites: int | None
    sites_digest: str | None
    roundings: tuple[Rounding, ...]
    site_rows: tuple[Injected, ...]
    plans: tuple[PlannedSite, ...]
    left_out: tuple[SiteLeftOut, ...]
    noise: tuple[NoiseStep, ...]
    noise_missed: tuple[float, ...]
    master_checks: int
    masters_unchanged: bool | None
    live_difference: float | None
    operands_held: tuple[str, ...]  # the phases whose operands were compared with their masters by value
    moved: float | None
    health: HealthSummary | None


def pooled_evidence(run: Run) -> RunEvidence:
    """The evidence of one run as a reader wants it."""
    live = [line.max_difference for line in run.of(LiveCheck)]
    masters = [line.unchanged for line in run.of(MasterCheck)]
    summary, plans = run.result.evidence, run.sites.plans
    return RunEvidence(
        sites=summary.sites if plans is None else len(plans),
        sites_digest=run.sites.digest,
        roundings=_roundings(run.of(Injected)),
        site_rows=tuple(run.of(Injected)),
        plans=plans or (),
        left_out=run.sites.left_out,
        noise=tuple(map(_noise_step, run.of(RolloutNoise))),
        noise_missed=tuple(sigma for line in run.of(NoiseStages) for sigma in line.missed),
        master_checks=len(masters),
        masters_unchanged=all(masters) if masters else None,
        live_difference=max(live, key=lambda value: (math.isnan(value), value), default=None),
        operands_held=tuple(dict.fromkeys(line.phase for line in run.of(Rounded))),
        moved=summary.weights_changed,
        health=summary.health,
    )


def _roundings(rows: Iterable[Injected]) -> tuple[Rounding, ...]:
    groups: dict[tuple[str, str], list[Injected]] = defaultdict(list)
    for row in rows:
        groups[phase_of(row), row.point].append(row)
    return tuple(
        Rounding(
            phase=phase,
            point=point,
            sites=len({row.site for row in group}),
            calls=sum(row.calls for row in group),
            elements=sum(row.elements for row in group),
            share_changed=_median(row.share_changed for row in group),
            relative_error=_median(row.relative_error for row in group),
        )
        for (phase, point), group in groups.items()
    )


def phase_of(row: Injected) -> str:
    """`rollout`, or `evaluation as w4a16`: evaluations record themselves under each profile."""
    return f"{row.phase} as {row.profile}" if row.profile else row.phase


def _noise_step(line: RolloutNoise) -> NoiseStep:
    asked = _pooled(line.layers, [layer.sigma for layer in line.layers])
    return NoiseStep(
        step=line.step,
        asked=line.sigma if asked is None else asked,
        realised=_pooled(line.layers, [layer.realised for layer in line.layers]),
        share_changed=line.share_changed,
    )


def _pooled(layers: Sequence[LayerNoise], sizes: Sequence[float]) -> float | None:
    """Root mean square over all weights; None where no layer says it."""
    elements = sum(layer.elements for layer in layers)
    squares = sum(size * size * layer.elements for size, layer in zip(sizes, layers, strict=True))
    return math.sqrt(squares / elements) if elements else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
