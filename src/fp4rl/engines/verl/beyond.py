"""What an experiment rounds in verl's rollouts besides the weights, which come rounded by the stream."""

from typing import Any

from fp4rl.spec.experiment import Experiment
from fp4rl.spec.points import LINEAR_POINTS, Phase


def beyond_weights(experiment: Experiment, phase: Phase) -> list[str]:
    """Return what acts in a phase of the rollout engine besides the rounding of weights."""
    injection = experiment.injection
    if injection is None:
        return []
    present = [p for p in (*LINEAR_POINTS, "kv_cache") if p != "weight" and getattr(injection, p) is not None]
    present += [p for p in LINEAR_POINTS[1:] if any(_rounds(row, p) for row in injection.by_pattern)]
    present += ["errors"] if injection.errors else []
    return [point for point in dict.fromkeys(present) if point in injection.apply_during.active(phase)]


def rounding_rollouts(experiment: Experiment) -> bool:
    """Return whether rollout engines have to round anything themselves, while they sample or are judged."""
    return any(beyond_weights(experiment, phase) for phase in ("rollout", "evaluation"))


def _rounds(row: Any, point: str) -> bool:
    return getattr(row, point, "keep") not in ("keep", None)
