"""Which reported experiments are held against which: the nearest control of each, and what else differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fp4rl.lab.audit.records import Record

Factor = Literal["noise", "hardware error", "format"]

# In this order: a control of one has neither it nor those before it.
_FACTORS: tuple[Factor | None, ...] = ("noise", "hardware error", "format", None)


@dataclass(frozen=True)
class Pair:
    """A treatment and its control, the factor in which they are meant to differ, and the fields that differ besides."""

    treatment: Record
    control: Record
    factor: Factor
    differs: tuple[str, ...]


def pairs(records: Sequence[Record]) -> tuple[Pair, ...]:
    """Find at most one control per record: against no noise, else against no hardware error, else against BF16."""
    results = [record for record in records if record.counts_as_result]
    matched = (_pair(record, results) for record in results)
    return tuple(pair for pair in matched if pair is not None)


def _pair(record: Record, results: Sequence[Record]) -> Pair | None:
    """The record against the control that differs in the fewest other fields, the first of several."""
    factor = _factor(record)
    if factor is None:
        return None
    controls = [other for other in results if _is_control(other, record, factor)]
    differing = [(other, _differs(record, other, factor)) for other in controls]
    nearest = min(differing, key=lambda candidate: len(candidate[1]), default=None)
    return Pair(record, nearest[0], factor, nearest[1]) if nearest else None


def _factor(record: Record) -> Factor | None:
    if record.aqn.enabled:
        return "noise"
    if record.hw_noise:
        return "hardware error"
    return "format" if record.quant_mode else None


def _is_control(other: Record, record: Record, factor: Factor) -> bool:
    """Without the factor, and the same in what makes a comparison at all: model, algorithm, adapter, other factors."""
    same = other.model == record.model and other.algorithm == record.algorithm and bool(other.lora) == bool(record.lora)
    if factor != "format":
        same = same and other.format == record.format and other.quant_mode == record.quant_mode
    if factor == "noise":
        return same and not other.aqn.enabled and other.hardware_error == record.hardware_error
    return same and _FACTORS.index(_factor(other)) > _FACTORS.index(factor)


def _differs(record: Record, other: Record, factor: Factor) -> tuple[str, ...]:
    """The fields in which the two differ besides the factor, each with both values."""
    names = ("epochs", "steps", "logged_step", "batch", "lora", *(["injection_point"] if factor == "noise" else []))
    values = [(name, getattr(record, name), getattr(other, name)) for name in names]
    shown = {"logged_step": "step of the number"}
    return tuple(f"{shown.get(name, name)}: {_shown(a)} against {_shown(b)}" for name, a, b in values if a != b)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return "not recorded" if value is None else str(value)
