"""The evidence that runs recorded (rounding by phase, noise, checks of weights), as values and as rows of a table."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from fp4rl.lab.report.descriptions import NOT_RECORDED, Row, in_words
from fp4rl.lab.runs import Run
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.evidence import Injected, LayerNoise, LiveCheck, MasterCheck, NoiseStages, RolloutNoise, Rounded
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, LINEAR_POINTS, PHASES
from fp4rl.spec.records import PlannedSite
from fp4rl.spec.transforms import Transformed
from fp4rl.spec.words import counted

MOST_RUNS = 6
_ORDER: dict[str, int] = {phase: order for order, phase in enumerate(PHASES)}
_Cells = Iterator[tuple[str, Sequence[str | None]]]  # None stands for what a run did not record


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
    """The noise of one rollout, pooled over layers: sigma scheduled and realised, share of weights changed."""

    step: int
    scheduled: float
    realised: float | None
    share_changed: float


@dataclass(frozen=True)
class ArmEvidence:
    """One arm: a column per finished run (`heads`), a row per fact; `more` finished runs are not
    shown. `sites`: the site table of its first run, `more_sites` of it left out."""

    arm: str
    heads: list[str]
    rows: list[Row]
    sites: list[list[str]]
    left_out: list[list[str]]
    more: int = 0
    more_sites: int = 0


def sites_quantized(run: Run) -> int | None:
    """Return the number of injected sites; None where the run did not record it."""
    return run.result.evidence.sites if run.sites.plans is None else len(run.sites.plans)


def roundings(run: Run) -> list[Rounding]:
    """Return the rounding of every point in every phase."""
    groups: dict[tuple[str, str], list[Injected]] = defaultdict(list)
    for row in run.of(Injected):
        groups[_phase_of(row), row.point].append(row)
    return [
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
    ]


def noise_steps(run: Run) -> list[NoiseStep]:
    """Return the noise of every rollout."""
    steps = []
    for line in run.of(RolloutNoise):
        scheduled, realised = _pooled(line.layers, "sigma"), _pooled(line.layers, "realised")
        steps.append(NoiseStep(line.step, line.sigma if scheduled is None else scheduled, realised, line.share_changed))
    return steps


def masters_unchanged(run: Run) -> bool | None:
    """Return whether all checks of the master weights passed; None without checks."""
    return all(line.unchanged for line in run.of(MasterCheck)) if run.of(MasterCheck) else None


def live_difference(run: Run) -> float | None:
    """Return the largest difference of the live policy from its saved copy; NaN counts as the largest."""
    differences = [line.max_difference for line in run.of(LiveCheck)]
    return max(differences, key=lambda value: (math.isnan(value), value), default=None)


def evidence_of(runs: Iterable[SuiteRun], arm: str) -> ArmEvidence:
    """Return everything that an arm's finished runs recorded; missing facts are named as such.

    Of many runs MOST_RUNS are shown: those without evidence first, then the others in order.
    """
    every = [(planned, planned.run) for planned in runs if planned.planned.arm == arm and planned.run is not None]
    finished = sorted(every, key=lambda own: own[0].counts)[:MOST_RUNS] if len(every) > MOST_RUNS else every
    shown = next((run for _, run in finished if run.sites.plans), None)
    return ArmEvidence(
        arm=arm,
        heads=[f"seed {planned.planned.seed}" for planned, _ in finished],
        more=len(every) - len(finished),
        rows=[(name, [cell or NOT_RECORDED for cell in cells]) for name, cells in _rows(finished)],
        sites=_sites(shown) if shown else [],
        left_out=[[row.site, row.reason] for row in shown.sites.left_out] if shown else [],
    )


def _rows(finished: Sequence[tuple[SuiteRun, Run]]) -> _Cells:
    if not finished:
        return
    runs = [run for _, run in finished]
    yield "enters the means", [f"no: {'; '.join(run.gaps)}" if run.gaps else "yes" for run in runs]
    yield from _if_any("start model", [_transforms(run) for run in runs])
    sites = [sites_quantized(run) for run in runs]
    yield "sites quantized", [None if count is None else str(count) for count in sites]
    yield from _if_any("site table", [run.sites.digest for run in runs])
    yield from _rounding_rows(runs, finished[0][0].planned.experiment.injection)
    yield from _noise_rows(runs)
    held = [", ".join(dict.fromkeys(line.phase for line in run.of(Rounded))) for run in runs]
    yield from _if_any("operands equal their masters' rounding", held)
    yield from _if_any("weights changed by training", [_share(run.result.evidence.weights_changed) for run in runs])
    yield "master weights", [_masters(run) for run in runs]
    yield "live policy", [_live(run) for run in runs]
    yield from _if_any("monitor", [_health(run) for run in runs])
    stale = [" (stale)" if planned.stale else "" for planned, _ in finished]
    yield "code", [f"{run.result.code_digest or NOT_RECORDED}{mark}" for run, mark in zip(runs, stale, strict=True)]
    yield "duration", ["-" if run.result.wall_s is None else f"{run.result.wall_s:.0f} s" for run in runs]


def _if_any(name: str, cells: Sequence[str | None]) -> _Cells:
    if any(cells):
        yield name, cells


def _rounding_rows(runs: Sequence[Run], injection: Injection | None) -> _Cells:
    """Yield calls, share changed and error of every phase and point that the spec describes or some run recorded."""
    by_key = [{(rounding.phase, rounding.point): rounding for rounding in roundings(run)} for run in runs]
    recorded = dict.fromkeys(key for rows in by_key for key in rows)
    # Evaluations are recorded per profile: "evaluation as deployment".
    begun = {(phase.partition(" ")[0], point) for phase, point in recorded}
    keys = [*recorded, *(key for key in _operands(injection) if key not in begun)]
    for phase, point in sorted(keys, key=lambda key: _ORDER.get(key[0].partition(" ")[0], len(_ORDER))):
        rows = [own.get((phase, point)) for own in by_key]
        yield f"{point}s rounded in {phase}", [f"{row.calls:,} calls" if row else None for row in rows]
        if any(rows):
            yield "  values changed", [_share(row.share_changed) if row else None for row in rows]
            yield "  relative error", [_share(row.relative_error) if row else None for row in rows]


def _operands(injection: Injection | None) -> Iterator[tuple[str, str]]:
    """Yield (phase, point) of every matmul operand that the injection rounds."""
    for point in LINEAR_POINTS:
        if injection is not None and getattr(injection, point) is not None:
            yield from ((phase, point) for phase in getattr(injection.apply_during, point))


def _noise_rows(runs: Sequence[Run]) -> _Cells:
    steps = [noise_steps(run) for run in runs]
    if not any(steps):
        return
    peaks = [max(own, key=lambda step: step.scheduled, default=None) for own in steps]
    yield "noise, largest sigma asked", [f"{peak.scheduled:.4g}" if peak else None for peak in peaks]
    realised = [peak.realised if peak else None for peak in peaks]
    yield "  realised there", [None if sigma is None else f"{sigma:.4g}" for sigma in realised]
    noisy = [[step.share_changed for step in own if step.scheduled > 0] for own in steps]
    yield "  weights changed", [_share(fmean(shares)) if shares else None for shares in noisy]
    counts = [f"{len(shares)} of {len(own)}" if own else None for shares, own in zip(noisy, steps, strict=True)]
    yield "  rollouts with noise", counts
    missed = [", ".join(f"{v:.3g}" for line in run.of(NoiseStages) for v in line.missed) for run in runs]
    if any(missed):
        yield "  sigma never reached", [values or "none" for values in missed]


def _sites(run: Run) -> list[list[str]]:
    rows: dict[str, list[Injected]] = defaultdict(list)
    for row in run.of(Injected):
        rows[row.site].append(row)
    return [_site(plan, rows[plan.site]) for plan in run.sites.plans or ()]


def _site(plan: PlannedSite, rows: Iterable[Injected]) -> list[str]:
    """Return a row: site, shape, formats, and for each phase its calls and the rounding of its operands."""
    size = " x ".join(map(str, plan.shape))
    formats = [(point, getattr(plan, point)) for point in FORMAT_POINTS]
    points = [f"{point} {in_words(fmt)}" for point, fmt in formats if fmt is not None]
    phases: dict[str, list[Injected]] = defaultdict(list)
    for row in rows:
        phases[_phase_of(row)].append(row)
    return [plan.site, size, "; ".join(points), "; ".join(_in_phase(phase, rows) for phase, rows in phases.items())]


def _in_phase(phase: str, rows: list[Injected]) -> str:
    calls = max(row.calls for row in rows)
    errors = [f"{row.point} {_share(row.relative_error)}" for row in rows if row.relative_error is not None]
    return ", ".join([f"{phase} {calls:,} calls", *errors])


def _phase_of(row: Injected) -> str:
    """Return `rollout`, or `evaluation as w4a16`: evaluations are recorded per profile."""
    return f"{row.phase} as {row.profile}" if row.profile else row.phase


def _transforms(run: Run) -> str | None:
    """Return what was done to the start model, and by how much that changed its logits."""
    for line in run.of(Transformed):
        names = ", ".join(str(transform["name"]) for transform in line.transforms)
        how = "as its start was" if line.difference is None else f"logits changed by {line.difference:.1g}"
        return f"{names}; {how}{'; the head has a weight of its own now' if line.untied else ''}"
    return None


def _masters(run: Run) -> str | None:
    unchanged = masters_unchanged(run)
    word = "unchanged" if unchanged else "CHANGED"
    return None if unchanged is None else f"{word}, {counted(len(run.of(MasterCheck)), 'check')}"


def _live(run: Run) -> str | None:
    difference = live_difference(run)
    if difference is None:
        return None
    return "equals a fresh copy" if difference == 0 else f"differs by {difference:g}"


def _health(run: Run) -> str | None:
    """Return the worst state of the run, its alarms by name, and how often it was rolled back."""
    health = run.result.evidence.health
    if health is None:
        return None
    alarms = [f"{alarm.check} at step {alarm.step}" for alarm in health.alarms]
    again = [f"rolled back {health.rollbacks} x, at a lower learning rate"] if health.rollbacks else []
    return "; ".join([health.state, *alarms, *again])


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _pooled(layers: Sequence[LayerNoise], name: str) -> float | None:
    """Return the root mean square, over all weights, of a number of the layers; None without layers."""
    elements = sum(layer.elements for layer in layers)
    squares = sum(getattr(layer, name) ** 2 * layer.elements for layer in layers)
    return math.sqrt(squares / elements) if elements else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
