"""Sigma as a pure function of (step, total): nothing is advanced, so nothing can be forgotten."""

from dataclasses import dataclass

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import Noise, NoiseSchedule


def sigma_at(schedule: NoiseSchedule, step: int, total: int) -> float:
    """Return the standard deviation of the noise in the rollout of `step`, counted from 0, of a run of `total` steps.

    Steps from `total` on get the last value. Raises InvalidValueError for a negative step or a run without steps.
    """
    if total < 1 or step < 0:
        raise InvalidValueError(f"no sigma for step {step} of {total}: count steps from 0 in a run of at least one")
    return schedule.at(min(step, total - 1), total)


def asked_sigma(noise: Noise, step: int, total: int) -> float:
    """Return `sigma_at` of the spec's schedule, and 0 in the control arm that walks the machinery without noise."""
    return 0.0 if noise.control == "sigma_zero" else sigma_at(noise.schedule, step, total)


@dataclass(frozen=True)
class Stage:
    """Neighbouring steps that share one sigma; `first` and `last` are steps counted from 0, both included."""

    first: int
    last: int
    sigma: float


def stages(schedule: NoiseSchedule, total: int) -> tuple[Stage, ...]:
    """Return the whole run as stages; a smooth schedule has one per step."""
    found: list[Stage] = []
    for step in range(total):
        sigma = sigma_at(schedule, step, total)
        if found and found[-1].sigma == sigma:
            found[-1] = Stage(found[-1].first, step, sigma)
        else:
            found.append(Stage(step, step, sigma))
    return tuple(found)


def values_missed(schedule: NoiseSchedule, total: int) -> tuple[float, ...]:
    """Return the values of a staged schedule that a run of `total` steps is too short to reach, the largest first."""
    reached = {stage.sigma for stage in stages(schedule, total)}
    return tuple(sorted({stage.sigma for stage in stages(schedule, schedule.steps_for_all)} - reached, reverse=True))
