"""How much of its best the policy has surely lost: the question that half of the checks ask."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt

from fp4rl.rl.health.histories import LEVELS, NOISE_WINDOW, SignalHistories, SignalHistory, sampling_error
from fp4rl.spec.health import Thresholds

# A level that never stood out from its noise has no gain to lose: a fall is then counted in units of the noise.
_IN_NOISE = 8.0
_ENOUGH = 10.0
_SEEN = 8  # observations whose scatter says more than the number of their answers
_LEAST = 1e-6  # a scale below this is a rounding error


@dataclass(frozen=True)
class Loss:
    """`share`: of the best level that is gone (0 within sampling error). `best`, `now`: the levels; `width`: steps."""

    share: float = 0.0
    best: float = 0.0
    now: float = 0.0
    width: int = 1


class _Error:
    """Standard deviation of one observation of the goal at a level: as it was seen, and at least what its answers make.

    A share over few answers varies most in the middle; what is seen beyond that is taken to be in proportion.
    """

    def __init__(self, histories: SignalHistories, goal: SignalHistory) -> None:
        self._seen = goal.spread()
        self._cases = histories.independent if histories.is_share else None
        self._beyond = 1.0
        level = goal.mean(min(len(goal), NOISE_WINDOW))
        if self._cases is not None and level is not None and len(goal) >= _SEEN:
            self._beyond = max(1.0, self._seen / sampling_error(level, self._cases))

    def at(self, level: float, width: int) -> float:
        """Of a mean over `width` observations."""
        return self._of_one(level) / sqrt(width)

    def of_difference(self, best: float, best_width: int, now: float, width: int) -> float:
        """Of the difference of two means, were both of one level: that of all their observations (two-proportion test).

        The error at `best` itself would hide a fall from the middle, where shares scatter most, down to nothing.
        """
        pooled = (best * best_width + now * width) / (best_width + width)
        return self._of_one(pooled) * sqrt(1 / best_width + 1 / width)

    def _of_one(self, level: float) -> float:
        return self._seen if self._cases is None else self._beyond * sampling_error(level, self._cases)

    def tells(self, width: int) -> bool:
        """Whether so many observations hold enough answers to be the measure of all that follows."""
        return width > 1 if self._cases is None else width * self._cases >= _ENOUGH


def lost(histories: SignalHistories, t: Thresholds) -> Loss:
    """What the policy has lost by now; asked by several checks, answered once a step.

    The present is held against the level of the beginning and against the best that any window has had, over several
    widths of both; a fall must exceed `t.certain` times the sampling error of the difference. The best of many windows
    is lucky, and what luck makes of that many is taken off it, so that it does not climb on noise. A reward that is no
    share (it is negative at times) has no zero to lose its part of: its loss is counted against what had been gained,
    and losing all of that is like losing half of an accuracy.
    """
    if histories.loss is None:
        histories.loss = _lost(histories, t)
    loss: Loss = histories.loss
    return loss


def _lost(histories: SignalHistories, t: Thresholds) -> Loss:
    goal = histories.goal
    error = _Error(histories, goal)
    worst = Loss()
    for width in (1, *LEVELS):
        now = goal.mean(width)
        if now is None:
            break
        for best, best_width in _levels(goal, len(goal) - width, error):
            certain = t.certain * error.of_difference(best, best_width, now, width)
            scale = best if histories.is_share else _gained(goal, best, error, t) / t.accuracy_drop
            if scale < _LEAST or best - now < max(t.accuracy_points, certain):
                continue
            worst = max(worst, Loss((best - now) / scale, best, now, width), key=lambda loss: loss.share)
    return worst


def _levels(goal: SignalHistory, before: int, error: _Error) -> Iterator[tuple[float, int]]:
    """(level, steps it is a mean over) of the beginning, as far as it lies `before` now, and of the best windows."""
    for width in (1, *LEVELS):
        if width <= before and error.tells(width):
            yield goal.start(width), width
    for width, mean in goal.bests.items():
        yield mean - sqrt(2 * log(len(goal) / width)) * error.at(mean, width), width


def _gained(goal: SignalHistory, best: float, error: _Error, t: Thresholds) -> float:
    start = goal.early(t.early)
    return max(best - start if start is not None else 0.0, _IN_NOISE * error.at(best, 1))
