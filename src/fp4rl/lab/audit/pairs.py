"""Which reported experiments are held against which: the nearest control of each, and what else differs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fp4rl.lab.audit.records import Record

Factor = Literal["noise", "hardware error", "format"]

_NAMES = {"logged_step": "step of the number"}


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
    factor = _factor(record)
    if factor is None:
        return None
    controls = [other for other in results if _is_control(other, record, factor)]
    if not controls:
        return None
    nearest = min(controls, key=lambda other: (len(_differs(record, other, factor)), results.index(other)))
    return Pair(record, nearest, factor, tuple(_differs(record, nearest, factor)))


def _factor(record: Record) -> Factor | None:
    if record.aqn.enabled:
        return "noise"
    if record.hw_noise:
        return "hardware error"
    return "format" if record.quant_mode else None


def _is_control(other: Record, record: Record, factor: Factor) -> bool:
    """Without the factor, and the same in what makes a comparison at all: model, algorithm, adapter, other factors."""
    same: list[Callable[[Record], Any]] = [lambda r: r.model, lambda r: r.algorithm, lambda r: bool(r.lora)]
    if factor != "format":
        same += [lambda r: r.format, lambda r: r.quant_mode]
    if factor == "noise":
        same.append(hardware_error)
    without = {
        "noise": not other.aqn.enabled,
        "hardware error": not other.aqn.enabled and not other.hw_noise,
        "format": not (other.aqn.enabled or other.hw_noise or other.quant_mode),
    }
    return other is not record and without[factor] and all(of(other) == of(record) for of in same)


def _differs(record: Record, other: Record, factor: Factor) -> list[str]:
    """The fields in which the two differ besides the factor, each with both values."""
    fields = ["epochs", "steps", "logged_step", "batch", "lora"]
    fields += ["injection_point"] if factor == "noise" else []
    return [
        f"{_NAMES.get(name, name)}: {_shown(getattr(record, name))} against {_shown(getattr(other, name))}"
        for name in fields
        if getattr(record, name) != getattr(other, name)
    ]


def hardware_error(record: Record) -> str:
    """Name a reported hardware error, of which one is written in several ways.

    'matmul 5%' and 'matmul 5% fwd+bwd' are the same, as are 'ALL_OPS 5%' and 'ALL_OPS 5% (matmul,...)'.
    """
    return re.sub(r"\s*\(.*\)|\s*fwd\+bwd", "", record.hw_noise or "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    return "not recorded" if value is None else str(value)
