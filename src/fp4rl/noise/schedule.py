"""Sigma as a function of (step, total), factors of layers, the progress of a run, and what BF16 keeps of the noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import groupby
from typing import Literal

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import EpochAware, Multipliers, Noise, NoiseSchedule

_MANTISSA_BITS = 7  # of BF16, without the leading one
_SMALLEST_EXPONENT = -126


def sigma_at(schedule: NoiseSchedule, step: int, total: int) -> float:
    """Return the standard deviation of the noise in the rollout of `step`, counted from 0, of a run of `total` steps.

    Steps from `total` on get the last value. Raises InvalidValueError for a negative step or a run without steps.
    """
    if total < 1 or step < 0:
        raise InvalidValueError(f"no sigma for step {step} of {total}: count steps from 0 in a run of at least one")
    return schedule.at(min(step, total - 1), total)


def asked_sigma(noise: Noise, step: int, total: int) -> float:
    """Return `sigma_at` of the spec's schedule; 0 in the control arm that runs the code without noise."""
    return 0.0 if noise.control == "sigma_zero" else sigma_at(noise.schedule, step, total)


@dataclass(frozen=True)
class Stage:
    """Neighbouring steps that share one sigma; `first` and `last` are steps counted from 0, both included."""

    first: int
    last: int
    sigma: float


def stages(schedule: NoiseSchedule, total: int) -> tuple[Stage, ...]:
    """Return the stages of a whole run; a smooth schedule has one per step."""
    runs = groupby(range(total), key=lambda step: sigma_at(schedule, step, total))
    return tuple(Stage(first, [first, *rest][-1], sigma) for sigma, (first, *rest) in runs)


def values_missed(schedule: NoiseSchedule, total: int) -> tuple[float, ...]:
    """Return the values of a staged schedule that a run of `total` steps is too short to reach, the largest first."""
    reached = {stage.sigma for stage in stages(schedule, total)}
    return tuple(sorted({stage.sigma for stage in stages(schedule, schedule.steps_for_all)} - reached, reverse=True))


@dataclass(frozen=True)
class ScheduleProgress:
    """The progress of a run of `total` steps through `epochs` equal parts, or shorter ones if the data repeat sooner.

    Epoch `epoch` of the schedule began at step `begun`. From there an epoch is expected to last `length` steps, the
    last one to the end of the run. Data that last longer than planned delay nothing: the number of steps is fixed.
    """

    total: int
    epochs: int = 1
    epoch: int = 0
    begun: int = 0
    length: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if self.total < 1 or self.epochs < 1:
            raise InvalidValueError(f"a run of {self.epochs} epochs in {self.total} steps has no step; use 1 or more")
        if not self.length:
            object.__setattr__(self, "length", Fraction(self.total, self.epochs))

    @classmethod
    def of(cls, noise: Noise, total: int) -> "ScheduleProgress":
        """Return the plan of a run under `noise`: only an epoch-aware schedule has more than one epoch."""
        return cls(total, noise.schedule.epochs if isinstance(noise.schedule, EpochAware) else 1)

    def sigma(self, noise: Noise, step: int) -> float:
        """Return sigma of the rollout of `step`, counted from 0."""
        if noise.control == "sigma_zero" or not isinstance(noise.schedule, EpochAware):
            return asked_sigma(noise, step, self.total)
        return noise.schedule.at_share(self.share(min(step, self.total - 1)))

    def share(self, step: int) -> Fraction:
        """Return how much of the schedule is done at `step` (0..1): whole epochs, and the part of the present one."""
        done = self.epoch + (step - self.begun) // self.length
        last = self.epochs - 1
        if done < last:
            return (done + (step - self.begun) % self.length / self.length) / self.epochs
        began = self.begun + (last - self.epoch) * self.length
        return (last + (step - began) / (self.total - began)) / self.epochs

    def at(self, step: int, data_epochs: float) -> "ScheduleProgress":
        """Return the progress before `step` and after `data_epochs` passes over the data, which may begin an epoch."""
        fresh = int(data_epochs)
        if fresh >= self.epochs or fresh <= int(self.share(step) * self.epochs):
            return self
        room = Fraction(self.total - step, self.epochs - fresh)
        return replace(self, epoch=fresh, begun=step, length=min(Fraction(step, fresh), room))


@dataclass
class StageLog:
    """The values of sigma that really ran, in order, and the number of rollouts of each."""

    ran: list[tuple[float, int]] = field(default_factory=list)

    def note(self, sigma: float) -> None:
        """Count one more rollout at this sigma."""
        if self.ran and self.ran[-1][0] == sigma:
            self.ran[-1] = (sigma, self.ran[-1][1] + 1)
        else:
            self.ran.append((sigma, 1))

    @property
    def rose(self) -> bool:
        """Whether the last rollout was the first at a sigma above the one before."""
        before = self.ran[-2][0] if len(self.ran) > 1 else 0.0
        return bool(self.ran) and self.ran[-1][1] == 1 and self.ran[-1][0] > before

    def missed(self, schedule: NoiseSchedule, total: int) -> tuple[float, ...]:
        """Return the values that the schedule has in a run of `total` steps and that never ran."""
        planned = {sigma_at(schedule, step, total) for step in range(total)}
        return tuple(sorted(planned - {sigma for sigma, _ in self.ran}, reverse=True))


def multiplier_at(multipliers: Multipliers, layer: int | None, layers: int, share: float | None = None) -> float:
    """Return the factor of `layer` (None outside the layers, as the final norm is) in a model of `layers` layers.

    `share` is the part of the run that is done, 0..1; InvalidValueError where a zone changes during the run without it.
    """
    own, zones = dict(multipliers.by_layer), multipliers.zones
    if layer in own:
        return own[layer]
    if layer is None or zones is None:
        return multipliers.others
    width = max(1, math.floor(zones.edge_share * layers))
    factor = zones.edge if layer < width or layer >= layers - width else zones.middle
    if factor.changes_at is None or factor.later is None:
        return factor.value
    if share is None:
        raise InvalidValueError("a zone's factor changes during the run: pass `share`, the part of it that is done")
    return factor.later if share >= factor.changes_at else factor.value


def require_layers(multipliers: Multipliers, layers: int) -> None:
    """Raise InvalidValueError for a multiplier of a layer that the model does not have: it would never act."""
    beyond = [layer for layer, _ in multipliers.by_layer if layer >= layers]
    if beyond:
        raise InvalidValueError(
            f"multipliers.by_layer names layer {beyond[0]}, but the model's last layer is {layers - 1}; "
            "the multipliers were made for another model"
        )


def share_bf16_can_change(
    values: Mapping[float, int], sigma: float, operation: Literal["additive", "multiplicative"], offset: float = 0.0
) -> float:
    """Return the expected share of weights (0..1) whose BF16 value changes under Gaussian noise of `sigma`.

    `values` counts the weights: BF16 value -> how many have it. A weight changes when the noise exceeds half the gap to
    a neighbour; below a power of two the gap is half as wide. `offset`: the layer multiplies by it + weight.
    """
    total = sum(values.values())
    if sigma <= 0 or not total:
        return 0.0
    relative = operation == "multiplicative"
    spreads = ((value, sigma * abs(value + offset) if relative else sigma) for value in values)
    changed = sum(values[value] * _passes(value, spread) for value, spread in spreads)
    return changed / total


def _passes(value: float, spread: float) -> float:
    if spread == 0.0:
        return 0.0
    outward, inward = _gaps(abs(value))  # each is crossed with probability P(N(0, spread) > gap / 2)
    return 0.5 * sum(math.erfc(gap / (2 * math.sqrt(2) * spread)) for gap in (outward, inward))


def _gaps(magnitude: float) -> tuple[float, float]:
    """Return the distances to the next BF16 value away from zero and towards it."""
    mantissa, exponent = math.frexp(magnitude)
    exponent = max(exponent - 1, _SMALLEST_EXPONENT) if magnitude else _SMALLEST_EXPONENT
    gap = math.ldexp(1.0, exponent - _MANTISSA_BITS)
    at_power_of_two = mantissa == 0.5 and exponent > _SMALLEST_EXPONENT
    return gap, gap / 2 if at_power_of_two else gap
