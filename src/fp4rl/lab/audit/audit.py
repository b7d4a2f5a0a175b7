"""Audit a file of reports: each comparison with its interval and confounds, each record with its noise."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fp4rl.lab.audit.confounds import NoiseFinding, confounds, noise_finding
from fp4rl.lab.audit.records import Record, Reports
from fp4rl.lab.statistics.proportions import ShareDifference, newcombe
from fp4rl.lab.statistics.seeds import Spread, holm, pooled

Factor = Literal["noise", "hardware error", "format"]

# In this order: the control for a factor has neither it nor the factors before it.
_FACTORS: tuple[Factor | None, ...] = ("noise", "hardware error", "format", None)


@dataclass(frozen=True)
class Pair:
    """A treatment and its control, the factor in which they are meant to differ, and other fields that differ."""

    treatment: Record
    control: Record
    factor: Factor
    differs: tuple[str, ...]


@dataclass(frozen=True)
class AuditedPair:
    """One published comparison in points, with an interval over problems (Newcombe); single runs give no verdict."""

    pair: Pair
    solved: tuple[int, int]
    difference: ShareDifference
    p_family: float
    noise: NoiseFinding
    spread: Spread | None

    @property
    def replicates(self) -> bool:
        """Whether the arms are repeats of each other: the noise was never effective, and nothing else differs."""
        return self.pair.factor == "noise" and self.noise.state == "never effective" and not self.pair.differs

    @property
    def inside_band(self) -> bool | None:
        """Whether the difference is no larger than between repeats; None where there are no repeats."""
        return None if self.spread is None else abs(100 * self.difference.value) <= self.spread.band((1, 1))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; differences in points."""
        treatment, control, difference = self.pair.treatment, self.pair.control, self.difference
        return {
            "treatment": treatment.id,
            "control": control.id,
            "factor": self.pair.factor,
            "accuracy": [treatment.final_accuracy, control.final_accuracy],
            "solved": self.solved,
            "difference": 100 * difference.value,
            "low": 100 * difference.low,
            "high": 100 * difference.high,
            "p": difference.p,
            "p_family": self.p_family,
            "treatment_noise": self.noise.state,
            "replicates": self.replicates,
            "inside_run_to_run_band": self.inside_band,
            "differs": self.pair.differs,
        }


@dataclass(frozen=True)
class AuditedRecord:
    """One report: whether its noise was effective, and the confounds of its number."""

    record: Record
    noise: NoiseFinding
    confounds: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """The whole audit. `spread`: run-to-run, from arms that turned out to be repeats; `repeats`: their ids."""

    problems: int
    pairs: tuple[AuditedPair, ...]
    records: tuple[AuditedRecord, ...]
    spread: Spread | None
    repeats: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; differences in points."""
        return {
            "problems": self.problems,
            "run_to_run": asdict(self.spread) if self.spread else None,
            "repeats": self.repeats,
            "comparisons": [pair.as_dict() for pair in self.pairs],
            "records": [
                {"id": report.record.id, "noise": asdict(report.noise), "confounds": report.confounds}
                for report in self.records
            ],
        }


def audit(reports: Reports) -> Audit:
    """Audit every comparison and every record of the file; p-values are corrected over all comparisons (Holm)."""
    findings = {record.id: noise_finding(record) for record in reports.records}
    groups = _repeats(reports.records, findings)
    spread = pooled([[record.logged_final or 0.0 for record in group] for group in groups])
    matched = pairs(reports.records)
    n = reports.gsm8k_test_n
    solved = [(pair.treatment.solved(n), pair.control.solved(n)) for pair in matched]
    shares = [newcombe((first, n), (second, n)) for first, second in solved]
    noises = [findings[pair.treatment.id] for pair in matched]
    parts = zip(matched, solved, shares, holm([share.p for share in shares]), noises, strict=True)
    return Audit(
        problems=n,
        pairs=tuple(AuditedPair(*part, spread) for part in parts),
        records=tuple(AuditedRecord(own, findings[own.id], confounds(own, reports)) for own in reports.records),
        spread=spread,
        repeats=tuple(tuple(record.id for record in group) for group in groups),
    )


def _repeats(records: tuple[Record, ...], findings: dict[str, NoiseFinding]) -> list[list[Record]]:
    """Return groups of runs that are equal but for the seed: equal settings, and no noise that was effective."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        silent = findings[record.id].state in ("none asked for", "never effective")
        if record.counts_as_result and record.status == "completed" and silent:
            fields = (record.model, record.algorithm, record.format, record.quant_mode, record.injection_point)
            schedule = (record.lora, record.epochs, record.steps, record.batch, record.logged_step)
            groups[repr((fields, record.hardware_error, schedule))].append(record)
    return [group for group in groups.values() if len(group) > 1]


def pairs(records: Sequence[Record]) -> tuple[Pair, ...]:
    """Find at most one control per record: against no noise, else against no hardware error, else against BF16."""
    results = [record for record in records if record.counts_as_result]
    paired = []
    for record in results:
        factor = _factor(record)
        controls = [other for other in results if factor and _is_control(other, record, factor)]
        if factor and controls:
            differing = [(other, _differs(record, other, factor)) for other in controls]
            nearest, differs = min(differing, key=lambda candidate: len(candidate[1]))  # the first of equals
            paired.append(Pair(record, nearest, factor, differs))
    return tuple(paired)


def _factor(record: Record) -> Factor | None:
    if record.aqn.enabled:
        return "noise"
    if record.hw_noise:
        return "hardware error"
    return "format" if record.quant_mode else None


def _is_control(other: Record, record: Record, factor: Factor) -> bool:
    """Return whether `other` lacks the factor and has the same model, algorithm, adapter and other factors."""
    same = other.model == record.model and other.algorithm == record.algorithm and bool(other.lora) == bool(record.lora)
    if factor != "format":
        same = same and other.format == record.format and other.quant_mode == record.quant_mode
    if factor == "noise":
        return same and not other.aqn.enabled and other.hardware_error == record.hardware_error
    return same and _FACTORS.index(_factor(other)) > _FACTORS.index(factor)


def _differs(record: Record, other: Record, factor: Factor) -> tuple[str, ...]:
    """Return the fields in which the two differ besides the factor, each with both values."""
    names = ("epochs", "steps", "logged_step", "batch", "lora", *(["injection_point"] if factor == "noise" else []))
    values = [(name, getattr(record, name), getattr(other, name)) for name in names]
    shown = {"logged_step": "step of the number"}
    return tuple(f"{shown.get(name, name)}: {_shown(a)} against {_shown(b)}" for name, a, b in values if a != b)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return "not recorded" if value is None else str(value)
