"""Sigma as a pure function of (step, total): nothing is advanced, so nothing can be forgotten."""

import math
from dataclasses import dataclass
from fractions import Fraction

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import Constant, Cosine, EpochAware, Geometric, Linear, Noise, NoiseSchedule


def sigma_at(schedule: NoiseSchedule, step: int, total: int) -> float:
    """Standard deviation of the noise in the rollout of `step`, counted from 0, of a run of `total` steps.

    Steps from `total` on get the last value. Raises InvalidValueError for a negative step or a run without steps.
    """
    if total < 1 or step < 0:
        raise InvalidValueError(f"no sigma for step {step} of {total}: count steps from 0 in a run of at least one")
    step = min(step, total - 1)
    match schedule:
        case Geometric():
            return _geometric(schedule, step, total)
        case EpochAware():
            return epoch_aware(schedule, Fraction(step, total))
        case Constant():
            return schedule.sigma
        case Linear() | Cosine():
            return _smooth(schedule, step, total)


def asked_sigma(noise: Noise, step: int, total: int) -> float:
    """`sigma_at` of the spec's schedule, and 0 in the control arm that walks the machinery without noise."""
    return 0.0 if noise.control == "sigma_zero" else sigma_at(noise.schedule, step, total)


def _geometric(schedule: Geometric, step: int, total: int) -> float:
    """Interval floor(step * K / total); 0 is silent, i + 1 has start * (end/start)^(i/(K-2)), i = 0..K-2."""
    interval = step * schedule.num_stages // total
    if interval == 0:
        return 0.0
    ratio = schedule.sigma_end / schedule.sigma_start
    return float(schedule.sigma_start * ratio ** ((interval - 1) / (schedule.num_stages - 2)))


def epoch_aware(schedule: EpochAware, share: Fraction) -> float:
    """Sigma when this share of the epochs is done, below 1. Exact: in floats 1/3 of three epochs is not quite one."""
    stages = schedule.stages_per_epoch
    epoch, inside = divmod(share * schedule.epochs, 1)
    slot = int(inside * (stages + 1))
    if slot == 0:
        return 0.0
    ratio = schedule.sigma_end / schedule.sigma_start
    return float(schedule.sigma_start * ratio ** ((epoch + (slot - 1) / (stages - 1)) / schedule.epochs))


def _smooth(schedule: Linear | Cosine, step: int, total: int) -> float:
    done = step / (total - 1) if total > 1 else 0.0
    left = 1 - done if isinstance(schedule, Linear) else 0.5 * (1 + math.cos(math.pi * done))
    return schedule.sigma_end + (schedule.sigma_start - schedule.sigma_end) * left


@dataclass(frozen=True)
class Stage:
    """Neighbouring steps that share one sigma; `first` and `last` are steps counted from 0, both included."""

    first: int
    last: int
    sigma: float


def stages(schedule: NoiseSchedule, total: int) -> tuple[Stage, ...]:
    """The whole run as stages; a smooth schedule has one per step."""
    found: list[Stage] = []
    for step in range(total):
        sigma = sigma_at(schedule, step, total)
        if found and found[-1].sigma == sigma:
            found[-1] = Stage(found[-1].first, step, sigma)
        else:
            found.append(Stage(step, step, sigma))
    return tuple(found)


def values_missed(schedule: NoiseSchedule, total: int) -> tuple[float, ...]:
    """Values of a staged schedule that a run of `total` steps is too short to reach (check P02)."""
    match schedule:
        case Geometric():
            long = schedule.num_stages
        case EpochAware():
            long = schedule.epochs * (schedule.stages_per_epoch + 1)
        case _:
            return ()
    reached = {stage.sigma for stage in stages(schedule, total)}
    return tuple(sorted({stage.sigma for stage in stages(schedule, long)} - reached, reverse=True))
