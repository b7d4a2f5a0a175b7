"""What one run shows of its treatment: calls and changes by phase, noise, master weights, live policy against saved."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from fp4rl.lab.folders import Record


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
class Evidence:
    """What a run recorded. None stands for what it did not record, never for a good result."""

    sites: int | None
    sites_digest: str | None
    roundings: tuple[Rounding, ...]
    site_rows: tuple[Record, ...]
    plans: tuple[Record, ...]
    left_out: tuple[Record, ...]
    noise: tuple[NoiseStep, ...]
    noise_missed: tuple[float, ...]
    master_checks: int
    master_unharmed: bool | None
    live_difference: float | None
    operands_held: tuple[str, ...]  # the phases whose operands were compared with their masters by value
    moved: float | None
    warnings: tuple[str, ...]  # what the run said aloud, in order
    health: Record | None


def read_evidence(lines: Iterable[Record], sites: Record, summary: Record) -> Evidence:
    """Lines of evidence.jsonl, sites.json and the summary in result.json as one value; what is not there is None."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in lines:
        kinds[str(record.get("kind"))].append(record)
    masters = [record.get("unharmed") for record in kinds["master"]]
    live = [number for r in kinds["live_equals_fresh"] if (number := _number(r.get("max_difference"))) is not None]
    return Evidence(
        sites=len(sites["plans"]) if "plans" in sites else summary.get("sites"),
        sites_digest=sites.get("digest"),
        roundings=_roundings(kinds["injection"]),
        site_rows=tuple(kinds["injection"]),
        plans=tuple(sites.get("plans", ())),
        left_out=tuple(sites.get("left_out", ())),
        noise=tuple(_noise_step(record) for record in kinds["noise"]),
        noise_missed=tuple(v for r in kinds["noise_stages"] for v in r.get("missed") or ()),
        master_checks=len(masters),
        master_unharmed=all(masters) if masters else None,
        live_difference=max(live) if live else None,
        operands_held=tuple(dict.fromkeys(phase_of(record).partition(" ")[0] for record in kinds["rounded"])),
        moved=_number(summary.get("weights_changed")),
        warnings=tuple(str(record.get("line")) for record in kinds["warning"]),
        health=summary.get("health"),
    )


def _roundings(rows: Iterable[Record]) -> tuple[Rounding, ...]:
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for row in rows:
        groups[phase_of(row), str(row.get("point", "weight"))].append(row)
    return tuple(
        Rounding(
            phase=phase,
            point=point,
            sites=len({row.get("site") for row in group}),
            calls=sum(int(row.get("calls", 0)) for row in group),
            elements=sum(int(row.get("elements", 0)) for row in group),
            share_changed=_median(row.get("share_changed") for row in group),
            relative_error=_median(row.get("relative_error") for row in group),
        )
        for (phase, point), group in groups.items()
    )


def phase_of(row: Record) -> str:
    """`rollout`, or `evaluation as w4a16`: evaluations record themselves under each profile."""
    return f"{row.get('phase')} as {row['profile']}" if row.get("profile") else str(row.get("phase"))


def _noise_step(record: Mapping[str, Any]) -> NoiseStep:
    layers = record.get("layers") or ()
    sigma = float(record.get("sigma", 0.0))
    asked = _pooled(layers, "sigma")
    return NoiseStep(
        step=int(record.get("step", 0)),
        asked=sigma if asked is None else asked,
        realised=_pooled(layers, "realised"),
        share_changed=float(record.get("share_changed", 0.0)),
    )


def _pooled(layers: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Root mean square over all weights; None where no layer says it."""
    pairs = [(_number(layer.get(key)), int(layer.get("elements", 0))) for layer in layers]
    known = [(value, elements) for value, elements in pairs if value is not None and elements]
    if not known:
        return None
    return math.sqrt(sum(v * v * n for v, n in known) / sum(n for _, n in known))


def _median(values: Iterable[Any]) -> float | None:
    known = [number for value in values if (number := _number(value)) is not None]
    return median(known) if known else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
