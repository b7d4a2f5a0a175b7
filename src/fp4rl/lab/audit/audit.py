"""The audit of a file of reports: each comparison with its interval and confounds, each record with its noise."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from fp4rl.lab.audit.confounds import NoiseFinding, confounds, noise_finding
from fp4rl.lab.audit.pairs import Pair, pairs
from fp4rl.lab.audit.records import Record, Reports
from fp4rl.lab.statistics.proportions import ShareDifference, newcombe
from fp4rl.lab.statistics.seeds import Spread, holm, pooled


@dataclass(frozen=True)
class AuditedPair:
    """One published comparison in points. The interval is over problems (Newcombe); each arm is one run, so no word."""

    pair: Pair
    solved: tuple[int, int]
    difference: ShareDifference
    p_family: float
    noise: NoiseFinding
    spread: Spread | None

    @property
    def replicates(self) -> bool:
        """Whether the arms repeat each other: noise that was never effective, and nothing else that differs."""
        return self.pair.factor == "noise" and self.noise.state == "never effective" and not self.pair.differs

    @property
    def inside_band(self) -> bool | None:
        """Whether the difference is no larger than two equal runs show; None where no repeats tell."""
        return None if self.spread is None else abs(100 * self.difference.value) <= self.spread.band((1, 1))


@dataclass(frozen=True)
class AuditedRecord:
    """One report: what its noise came to, and what stands between its number and a conclusion."""

    record: Record
    noise: NoiseFinding
    confounds: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """`spread`: run-to-run, from arms that turned out to be repeats; `repeats`: the ids that it rests on."""

    problems: int
    pairs: tuple[AuditedPair, ...]
    records: tuple[AuditedRecord, ...]
    spread: Spread | None
    repeats: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a program; differences in points."""
        return {
            "problems": self.problems,
            "run_to_run": asdict(self.spread) if self.spread else None,
            "repeats": self.repeats,
            "comparisons": [_pair_dict(pair) for pair in self.pairs],
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
    corrected = holm([share.p for share in shares])
    return Audit(
        problems=n,
        pairs=tuple(
            AuditedPair(pair, counts, share, p, findings[pair.treatment.id], spread)
            for pair, counts, share, p in zip(matched, solved, shares, corrected, strict=True)
        ),
        records=tuple(
            AuditedRecord(record, findings[record.id], confounds(record, reports)) for record in reports.records
        ),
        spread=spread,
        repeats=tuple(tuple(record.id for record in group) for group in groups),
    )


def _repeats(records: tuple[Record, ...], findings: dict[str, NoiseFinding]) -> list[list[Record]]:
    """Runs that were the same but for the seed: equal settings, and noise not asked for or never effective."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        silent = findings[record.id].state in ("none asked for", "never effective")
        if record.counts_as_result and record.status == "completed" and silent:
            fields = (record.model, record.algorithm, record.format, record.quant_mode, record.injection_point)
            schedule = (record.lora, record.epochs, record.steps, record.batch, record.logged_step)
            groups[repr((fields, record.hardware_error, schedule))].append(record)
    return [group for group in groups.values() if len(group) > 1]


def _pair_dict(audited: AuditedPair) -> dict[str, Any]:
    return {
        "treatment": audited.pair.treatment.id,
        "control": audited.pair.control.id,
        "factor": audited.pair.factor,
        "accuracy": [audited.pair.treatment.final_accuracy, audited.pair.control.final_accuracy],
        "solved": audited.solved,
        "difference": 100 * audited.difference.value,
        "low": 100 * audited.difference.low,
        "high": 100 * audited.difference.high,
        "p": audited.difference.p,
        "p_family": audited.p_family,
        "treatment_noise": audited.noise.state,
        "replicates": audited.replicates,
        "inside_run_to_run_band": audited.inside_band,
        "differs": audited.pair.differs,
    }
