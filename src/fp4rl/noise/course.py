"""Where a run really is: dynamic sampling can use up an epoch's data early, and the schedule follows."""

from dataclasses import dataclass, field, replace

from fp4rl.noise.schedule import sigma_at
from fp4rl.spec.mistakes import BadValue
from fp4rl.spec.noise import NoiseSchedule


@dataclass(frozen=True)
class Course:
    """A run in epochs, on optimisation steps really completed.

    An epoch that ends after n steps makes n the expected length of those to come; an epoch that runs longer than
    expected stays in its last stage until it ends. `position` is the (step, total) pair that a schedule wants.
    """

    steps_per_epoch: int
    epochs: int = 1
    epoch: int = 0
    step_in_epoch: int = 0
    completed: int = 0

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1 or self.epochs < 1:
            raise BadValue(f"a run of {self.epochs} epochs of {self.steps_per_epoch} steps has no step; use 1 or more")

    @property
    def position(self) -> tuple[int, int]:
        """(step, total) for `sigma_at`, in steps of the length now expected."""
        inside = min(self.step_in_epoch, self.steps_per_epoch - 1)
        epoch = min(self.epoch, self.epochs - 1)
        return epoch * self.steps_per_epoch + inside, self.epochs * self.steps_per_epoch

    def step_done(self) -> "Course":
        """After a completed optimisation step (not after a skipped or refilled batch)."""
        return replace(self, step_in_epoch=self.step_in_epoch + 1, completed=self.completed + 1)

    def epoch_ended(self) -> "Course":
        """When the data of an epoch is used up; an epoch without a single step keeps the expected length."""
        return replace(
            self, epoch=self.epoch + 1, step_in_epoch=0, steps_per_epoch=self.step_in_epoch or self.steps_per_epoch
        )


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

    def missed(self, schedule: NoiseSchedule, total: int) -> tuple[float, ...]:
        """Values that the plan for `total` steps holds and that never ran."""
        planned = {sigma_at(schedule, step, total) for step in range(total)}
        return tuple(sorted(planned - {sigma for sigma, _ in self.ran}, reverse=True))
