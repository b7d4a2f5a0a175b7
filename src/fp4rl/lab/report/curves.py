"""Learning curves of an arm: the mean of its runs at every step, and the range that its seeds span."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from fp4rl.lab.suites import SuiteRun

MOST_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """One metric of one arm: per step the mean over its runs, and the lowest and highest of them."""

    arm: str
    metric: str
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


def curve(arm: str, metric: str, runs: Iterable[SuiteRun], scale: float = 1.0) -> Curve | None:
    """The curve over the arm's runs that count, times `scale`; None where none of them logged the metric."""
    logged = [_finite(run, metric, scale) for run in runs if run.planned.arm == arm and run.counts]
    logged = [values for values in logged if values]
    steps = sorted({step for values in logged for step in values})
    if not steps:
        return None
    at = [[values[step] for values in logged if step in values] for step in steps]
    rows = _thinned([(float(s), fmean(v), min(v), max(v)) for s, v in zip(steps, at, strict=True)])
    x, mean, low, high = zip(*rows, strict=True)
    return Curve(arm, metric, x, mean, low, high, len(logged))


def _finite(run: SuiteRun, metric: str, scale: float) -> dict[int, float]:
    values_by_step = {step: values[metric] for step, values in run.curves.items() if metric in values}
    return {step: scale * value for step, value in values_by_step.items() if math.isfinite(value)}


def _thinned(rows: Sequence[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """At most MOST_POINTS rows, each the mean of its neighbours; a page of long runs stays small."""
    if len(rows) <= MOST_POINTS:
        return list(rows)
    size = math.ceil(len(rows) / MOST_POINTS)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tuple(fmean(column) for column in zip(*group, strict=True)) for group in groups]
