"""The evidence of an arm as rows of words: a column per run, and `not recorded` for what a run did not say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.descriptions import NOT_RECORDED, Row, format_words
from fp4rl.lab.report.evidence import RunEvidence, phase_of, pooled_evidence
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.evidence import Injected
from fp4rl.spec.injection import Injection
from fp4rl.spec.modes import PHASES
from fp4rl.spec.points import FORMAT_POINTS, LINEAR_POINTS
from fp4rl.spec.records import PlannedSite
from fp4rl.spec.words import counted

_ORDER: dict[str, int] = {phase: order for order, phase in enumerate(PHASES)}


@dataclass(frozen=True)
class ArmEvidence:
    """One arm: a column per finished run (`heads`), a row per fact. `sites`: the site table of its first run."""

    arm: str
    heads: list[str]
    rows: list[Row]
    sites: list[list[str]]
    left_out: list[list[str]]


def evidence_of(report: SuiteReport, arm: str) -> ArmEvidence:
    """Everything that an arm's finished runs recorded, missing facts named as such."""
    runs = [run for run in report.finished if run.planned.arm == arm]
    facts = [pooled_evidence(run.run) for run in runs if run.run is not None]
    shown = next((facts_of_run for facts_of_run in facts if facts_of_run.plans), None)
    return ArmEvidence(
        arm=arm,
        heads=[f"seed {run.planned.seed}" for run in runs],
        rows=list(_rows(runs, facts)) if runs else [],
        sites=[_site(shown, plan) for plan in shown.plans] if shown else [],
        left_out=[[row.site, row.reason] for row in shown.left_out] if shown else [],
    )


def _rows(runs: Sequence[SuiteRun], facts: Sequence[RunEvidence]) -> Iterator[Row]:
    yield "enters the means", ["yes" if run.counts else f"no: {'; '.join(run.gaps)}" for run in runs]
    yield "sites quantized", [_known(e.sites) for e in facts]
    if any(e.sites_digest for e in facts):
        yield "site table", [e.sites_digest or NOT_RECORDED for e in facts]
    yield from _rounding_rows(facts, runs[0].planned.experiment.injection)
    yield from _noise_rows(facts)
    if any(e.operands_held for e in facts):
        yield "operands equal their masters' rounding", [", ".join(e.operands_held) or NOT_RECORDED for e in facts]
    if any(e.moved is not None for e in facts):
        yield "weights changed by training", [_share(e.moved) for e in facts]
    yield "master weights", [_master(e) for e in facts]
    yield "live policy", [_live(e) for e in facts]
    if any(e.health for e in facts):
        yield "monitor", [_health(e) for e in facts]
    yield "code", [f"{run.code_digest or NOT_RECORDED}{' (stale)' if run.stale else ''}" for run in runs]
    yield "duration", ["-" if run.wall_s is None else f"{run.wall_s:.0f} s" for run in runs]


def _rounding_rows(facts: Sequence[RunEvidence], injection: Injection | None) -> Iterator[Row]:
    """Calls, share changed and error of every phase and point that the spec asks for or some run recorded."""
    roundings = [{(r.phase, r.point): r for r in e.roundings} for e in facts]
    seen = dict.fromkeys(key for rows in roundings for key in rows)
    # Evaluations record themselves per profile: "evaluation as deployment".
    unseen = [
        (phase, point) for phase, point in _asked(injection) if not any(_within(key, phase, point) for key in seen)
    ]
    keys = [*seen, *unseen]
    for phase, point in sorted(keys, key=lambda key: _ORDER.get(key[0].partition(" ")[0], len(_ORDER))):
        rows = [by_key.get((phase, point)) for by_key in roundings]
        yield f"{point}s rounded in {phase}", [NOT_RECORDED if r is None else f"{r.calls:,} calls" for r in rows]
        if any(rows):
            yield "  values changed", [_share(r.share_changed if r else None) for r in rows]
            yield "  relative error", [_share(r.relative_error if r else None) for r in rows]


def _within(key: tuple[str, str], phase: str, point: str) -> bool:
    return key[1] == point and key[0].partition(" ")[0] == phase


def _asked(injection: Injection | None) -> Iterator[tuple[str, str]]:
    """(phase, point) of every matmul operand that the injection rounds."""
    if injection is None:
        return
    for point in LINEAR_POINTS:
        if getattr(injection, point) is not None:
            yield from ((phase, point) for phase in getattr(injection.apply_during, point))


def _noise_rows(facts: Sequence[RunEvidence]) -> Iterator[Row]:
    if not any(e.noise for e in facts):
        return
    peaks = [max(e.noise, key=lambda step: step.asked, default=None) for e in facts]
    yield "noise, largest sigma asked", [_known(p and f"{p.asked:.4g}") for p in peaks]
    yield "  realised there", [_known(p and p.realised is not None and f"{p.realised:.4g}") for p in peaks]
    shares = [[step.share_changed for step in e.noise if step.asked > 0] for e in facts]
    yield "  weights changed", [_share(fmean(values)) if values else NOT_RECORDED for values in shares]
    yield (
        "  rollouts with noise",
        [f"{sum(s.asked > 0 for s in e.noise)} of {len(e.noise)}" if e.noise else NOT_RECORDED for e in facts],
    )
    if any(e.noise_missed for e in facts):
        yield "  sigma never reached", [", ".join(f"{v:.3g}" for v in e.noise_missed) or "none" for e in facts]


def _site(evidence: RunEvidence, plan: PlannedSite) -> list[str]:
    """Site, shape, formats, and by phase how often it was called and what rounding did to its operands."""
    size = " x ".join(map(str, plan.shape))
    formats = [(point, getattr(plan, point)) for point in FORMAT_POINTS]
    points = [f"{point} {format_words(fmt)}" for point, fmt in formats if fmt is not None]
    phases: dict[str, list[Injected]] = {}
    for row in (row for row in evidence.site_rows if row.site == plan.site):
        phases.setdefault(phase_of(row), []).append(row)
    return [plan.site, size, "; ".join(points), "; ".join(_in_phase(phase, rows) for phase, rows in phases.items())]


def _in_phase(phase: str, rows: list[Injected]) -> str:
    calls = max(row.calls for row in rows)
    errors = [f"{row.point} {_share(row.relative_error)}" for row in rows if row.relative_error is not None]
    return ", ".join([f"{phase} {calls:,} calls", *errors])


def _master(evidence: RunEvidence) -> str:
    if evidence.masters_unchanged is None:
        return NOT_RECORDED
    word = "unchanged" if evidence.masters_unchanged else "CHANGED"
    return f"{word}, {counted(evidence.master_checks, 'check')}"


def _live(evidence: RunEvidence) -> str:
    if evidence.live_difference is None:
        return NOT_RECORDED
    if evidence.live_difference == 0:
        return "equals a fresh copy"
    return f"differs by {evidence.live_difference:g}"


def _health(evidence: RunEvidence) -> str:
    """The worst state of the run, its alarms by name, and how often it was rolled back."""
    if evidence.health is None:
        return NOT_RECORDED
    alarms = [f"{alarm.check} at step {alarm.step}" for alarm in evidence.health.alarms]
    rollbacks = evidence.health.rollbacks
    again = [f"rolled back {rollbacks} x, at a lower learning rate"] if rollbacks else []
    return "; ".join([evidence.health.state, *alarms, *again])


def _known(value: object) -> str:
    return NOT_RECORDED if value is None or value is False else str(value)


def _share(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{100 * value:.1f} %"
