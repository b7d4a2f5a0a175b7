"""All signals of one run, and the one question every check asks of them: is the policy getting worse?"""

from collections.abc import Mapping

from fp4rl.rl.health.course import Course
from fp4rl.rl.health.signals import NAMES
from fp4rl.spec.health import Thresholds


class Courses:
    """One `Course` per signal; a signal nobody logs has an empty one."""

    def __init__(self) -> None:
        self._of = {signal: Course() for signal in NAMES}
        self.now: Mapping[str, float] = {}

    def add(self, step: int, signals: Mapping[str, float]) -> None:
        """The signals of one more step; `now` keeps them as they came, non-finite ones too."""
        self.now = signals
        for signal, value in signals.items():
            self._of[signal].add(step, value)

    def __getitem__(self, signal: str) -> Course:
        return self._of[signal]

    def value(self, signal: str) -> float | None:
        """The signal in this very step, None when this step does not have it."""
        return self._of[signal].last if signal in self.now else None

    @property
    def goal(self) -> Course:
        """What the run is for: rollout accuracy, or the reward where nobody logs accuracy."""
        return self["accuracy"] if len(self["accuracy"]) else self["reward"]


def told(courses: Courses, signals: tuple[str, ...]) -> str:
    """The courses of `signals` in a few words, and which of them nobody logs."""
    seen = [f"{name} {courses[name].first:.3g} -> {courses[name].last:.3g}" for name in signals if len(courses[name])]
    unseen = [name for name in signals if not len(courses[name])]
    beside = [f"no {' or '.join(unseen)} logged"] if unseen else []
    if "accuracy" in unseen and len(courses["reward"]) and "reward" not in signals:
        beside.append(f"goes by {told(courses, ('reward',))}")
    return ", ".join([*seen, *beside])


def lacking(courses: Courses, needs: tuple[tuple[str, ...], ...]) -> str:
    """What is not logged although one of it is needed, by the names that trainers log it under; empty if all is there.

    A check without data is no good news.
    """
    missing = [signals for signals in needs if not any(len(courses[signal]) for signal in signals)]
    return "; ".join(f"needs {' or '.join(n for signal in signals for n in NAMES[signal])}" for signals in missing)


def lost(courses: Courses, t: Thresholds) -> float:
    """Share of its best accuracy that the policy has lost by now; 0 while the loss is within the run's own noise."""
    goal = courses.goal
    best, last = goal.best, goal.last
    if best is None or last is None or best <= 0:
        return 0.0
    points = best - last
    if points < max(t.accuracy_points, t.noise * (goal.noise() or 0.0)):
        return 0.0
    return points / best


def rising(courses: Courses, ago: int = 5) -> bool:
    """Whether accuracy is above what it was `ago` observations ago by more than its noise."""
    goal = courses.goal
    now, before = goal.level(3), goal.level(3, ago)
    return now is not None and before is not None and now - before > (goal.noise() or 0.0)


def solved(courses: Courses, t: Thresholds) -> bool:
    """Whether so much is right that an empty learning signal is a success."""
    level = courses["accuracy"].level(1)
    return level is not None and level >= t.solved
