"""How much of its best the policy has surely lost: the question that half of the checks ask."""

from dataclasses import dataclass

from fp4rl.rl.health.course import LEVELS, Course
from fp4rl.rl.health.courses import Courses
from fp4rl.rl.health.shares import sampling_error
from fp4rl.spec.health import Thresholds

# A level that never stood out from its noise has no gain to lose: a fall is then counted in units of the noise.
_IN_NOISE = 8.0


@dataclass(frozen=True)
class Loss:
    """`share`: of the best level that is gone (0 within sampling error). `best`, `now`: the levels; `width`: steps."""

    share: float = 0.0
    best: float = 0.0
    now: float = 0.0
    width: int = 1


def lost(courses: Courses, t: Thresholds) -> Loss:
    """What the policy has lost by now.

    The best is the level that the run has had for sure: the highest mean of a window less its sampling error, so that
    it does not climb on luck. The present is held against it over several windows, each by its own sampling error, and
    the largest loss counts. A reward that is no share (it is negative at times) has no zero to lose its part of: its
    loss is counted against what had been gained, and losing all of that is like losing half of an accuracy.
    """
    goal = courses.goal
    error = _error(courses, goal)
    best = max((mean - t.certain * error / width**0.5 for width, mean in goal.bests().items()), default=None)
    if best is None:
        return Loss()
    scale = best if courses.is_share else _gained(goal, best, error, t) / t.accuracy_drop
    if scale <= 0:
        return Loss()
    return max((_over(goal, width, best, error, scale, t) for width in (1, *LEVELS)), key=lambda loss: loss.share)


def _over(goal: Course, width: int, best: float, error: float, scale: float, t: Thresholds) -> Loss:
    now = goal.mean(width)
    if now is None or best - now < max(t.accuracy_points, t.certain * error / width**0.5):
        return Loss()
    return Loss((best - now) / scale, best, now, width)


def _error(courses: Courses, goal: Course) -> float:
    """Standard deviation of one observation: as it was seen, and at least what its number of answers makes."""
    cases = courses.independent if courses.is_share else None
    level = goal.mean(min(len(goal), LEVELS[-1]))
    of_the_count = sampling_error(level, cases) if cases is not None and level is not None else 0.0
    return max(goal.spread(), of_the_count)


def _gained(goal: Course, best: float, error: float, t: Thresholds) -> float:
    start = goal.early(t.early)
    return max(best - start if start is not None else 0.0, _IN_NOISE * error)
