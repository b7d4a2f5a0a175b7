"""Where a run really is: dynamic sampling can use up an epoch's data early, and an epoch-aware schedule follows."""

from dataclasses import dataclass, field, replace
from fractions import Fraction

from fp4rl.noise.schedule import asked_sigma, sigma_at
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import EpochAware, Noise, NoiseSchedule


@dataclass(frozen=True)
class ScheduleProgress:
    """A run of `total` optimisation steps in `epochs` equal parts, until the data begin anew sooner than that.

    Epoch `epoch` of the schedule began at step `begun`. From then on an epoch is expected to last `length` steps, and
    the last one lasts to the end of the run. Data that last longer than planned delay nothing: the number of steps is
    fixed, and a schedule that waited for them would never fade.
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
        """The plan of a run under `noise`: only an epoch-aware schedule has more than one epoch."""
        return cls(total, noise.schedule.epochs if isinstance(noise.schedule, EpochAware) else 1)

    def sigma(self, noise: Noise, step: int) -> float:
        """What the rollout of `step` asks for; steps are counted from 0."""
        if noise.control == "sigma_zero" or not isinstance(noise.schedule, EpochAware):
            return asked_sigma(noise, step, self.total)
        return noise.schedule.at_share(self.share(min(step, self.total - 1)))

    def share(self, step: int) -> Fraction:
        """How much of the schedule is done at `step` (0..1): whole epochs, and what is done of the one it is in."""
        done = self.epoch + (step - self.begun) // self.length
        last = self.epochs - 1
        if done < last:
            return (done + (step - self.begun) % self.length / self.length) / self.epochs
        began = self.begun + (last - self.epoch) * self.length
        return (last + (step - began) / (self.total - began)) / self.epochs

    def at(self, step: int, data_epochs: float) -> "ScheduleProgress":
        """Before `step`, when the data have been gone through `data_epochs` times: the next epoch if that is early."""
        fresh = int(data_epochs)
        if fresh >= self.epochs or fresh <= int(self.share(step) * self.epochs):
            return self
        return replace(self, epoch=fresh, begun=step, length=min(Fraction(step, fresh), self._room(step, fresh)))

    def _room(self, step: int, epoch: int) -> Fraction:
        return Fraction(self.total - step, self.epochs - epoch)


@dataclass
class StageLog:
    """Which values of sigma really ran, in order, and for how many rollouts each."""

    ran: list[tuple[float, int]] = field(default_factory=list)

    def note(self, sigma: float) -> None:
        """One more rollout at this sigma."""
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
        """Values that the plan for `total` steps holds and that never ran."""
        planned = {sigma_at(schedule, step, total) for step in range(total)}
        return tuple(sorted(planned - {sigma for sigma, _ in self.ran}, reverse=True))
