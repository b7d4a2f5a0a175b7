"""In which factors two descriptions differ, seeds aside; and what of one can touch a weight."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp4rl.lab.gaps import points_named
from fp4rl.spec.points import FORMAT_POINTS, PHASES, ApplyDuring

# Described as a whole: two recipes of noise or injection differ in one factor, however many keys write it down.
_WHOLE = ("injection", "noise")
# Which profiles are measured changes no number; what a number was measured under is compared where the number is.
_NO_FACTOR = ("evaluation.profiles", "evaluation.injections")

Differences = dict[str, tuple[Any, Any]]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Differences:
    """Dotted key -> (value in the first, value in the second)."""
    differing = dict(_differ(first, second, ""))
    return {key: pair for key, pair in differing.items() if key != "seed" and not covered(key, _NO_FACTOR)}


def undeclared(differing: Differences, factors: Sequence[str]) -> Differences:
    """The differences that no declared factor covers.

    Where none is declared, one factor may differ: one key, or the injection, or the noise, each as a whole.
    """
    if factors:
        return {key: pair for key, pair in differing.items() if not covered(key, factors)}
    return differing if len({factor_of(key) for key in differing}) > 1 else {}


def covered(key: str, factors: Sequence[str]) -> bool:
    """A factor covers its own key and everything below it."""
    return any(key == factor or key.startswith(f"{factor}.") for factor in factors)


def factor_of(key: str) -> str:
    """The factor that a key belongs to when none is declared."""
    head = key.partition(".")[0]
    return head if head in _WHOLE else key


def in_few_words(value: Any) -> str:
    """A value in few words."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def training_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a description can touch a weight: all but how it is judged."""
    part = {key: value for key, value in spec.items() if key not in ("evaluation", "seed")}
    injection = spec.get("injection")
    return part | {"injection": _trained_under(injection) if isinstance(injection, Mapping) else None}


def _trained_under(injection: Mapping[str, Any]) -> dict[str, Any] | None:
    """An injection without the points that act in evaluations alone; None where nothing is left of it."""
    during = ApplyDuring.model_validate(injection.get("apply_during") or {})
    phases = {phase: during.active(phase) for phase in PHASES if phase != "evaluation"}
    idle = {*FORMAT_POINTS, "errors"}.difference(*phases.values())
    table, *by_pattern = (
        {key: value for key, value in described.items() if key not in idle}
        for described in (injection, *(injection.get("by_pattern") or ()))
    )
    points = points_named(injection) - idle | ({"errors"} if table.get("errors") else set())
    if not points:
        return None
    # The mode and the preset only name what the points hold.
    named = {key: value for key, value in table.items() if key not in ("mode", "preset", "apply_during")}
    acting = {phase: sorted(active & points) for phase, active in phases.items()}
    return named | {"by_pattern": by_pattern, "phases": acting}


def _differ(first: Any, second: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            yield from _differ(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif first != second:
        yield path, (first, second)
