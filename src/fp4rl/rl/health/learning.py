"""Checks on whether the policy learns what it should: accuracy, reward against validation, and rewards that differ.

`lost` says how much of its best the policy has surely lost: the question that half of the checks ask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, sqrt

from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.histories import (
    LEVELS,
    NOISE_WINDOW,
    SignalHistories,
    SignalHistory,
    grain,
    sampling_error,
    solved,
)
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
        """Return whether so many observations hold enough answers to be the measure of all that follows."""
        return width > 1 if self._cases is None else width * self._cases >= _ENOUGH


def lost(histories: SignalHistories, t: Thresholds) -> Loss:
    """Return what the policy has lost by now; asked by several checks, answered once a step.

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


# Validations in a row without a new best before a rising reward looks suspicious.
_FLAT = 4
_RECENT = 20
_AGO = 3
# Groups that must all lack spread before it is said that nearly all do: 0.95 ** 48 is 0.09, three times in a row.
_GROUPS = 48
_FEW = 3.0  # groups a step, where nobody knows
# Groups over which reward and accuracy are correlated, and how far below 0: four standard deviations of 16 groups of 4.
_TELLING = 16
_AGAINST = 0.5
# A share of groups with spread from which a fall can be told from chance: 1 of 16 groups is 0.06.
_SPREAD_ENOUGH = 0.3


def accuracy_collapse(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Most of the best accuracy is gone, or the rollouts are far worse than the same policy when it is evaluated."""
    return worst([_against_its_best(histories, t), _against_validation(histories, t)])


def _against_its_best(histories: SignalHistories, t: Thresholds) -> Verdict:
    loss = lost(histories, t)
    if loss.share < t.accuracy_drop_watch:
        return OK
    what = "accuracy" if len(histories["accuracy"]) else "reward"
    part = f"{loss.share:.0%} below" if histories.is_share else "down from"
    over = f" over {loss.width} steps" if loss.width > 1 else ""
    evidence = f"{what} {loss.now:.3g}{over}, {part} its best of {loss.best:.3g}"
    return Verdict("alarm" if loss.share >= t.accuracy_drop else "watch", evidence, severity=loss.share)


def _against_validation(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Noise or quantization in the rollout alone leaves a policy that only validates well."""
    rollout, validation = histories.pooled("accuracy"), histories["validation"].last
    if rollout is None or validation is None or validation - rollout < 2 * t.accuracy_points:
        return OK
    if rollout >= t.below_validation * validation:
        return OK
    return Verdict("alarm", f"accuracy {rollout:.3g} in rollouts against {validation:.3g} at validation")


def reward_hacking(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Reward climbs while what it stands for does not."""
    return worst([_wrong_earns(histories), _against_accuracy(histories, t), _reward_against_validation(histories, t)])


def _wrong_earns(histories: SignalHistories) -> Verdict:
    """At once, before anything is lost: of two answers to one prompt the wrong one earns more, as a rule."""
    now = histories.pooled("reward_accuracy", _TELLING)
    if now is None or now > -_AGAINST:
        return OK
    return Verdict("alarm", f"wrong answers earn more than right ones (correlation {now:.2f}): is the sign right?")


def _against_accuracy(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Fast: accuracy of the very answers that earned the reward."""
    reward, accuracy = histories["reward"], histories["accuracy"]
    now, start = reward.level(3), reward.early(t.early)
    if now is None or start is None or not len(accuracy):
        return OK
    drop = lost(histories, t).share
    if drop < t.accuracy_drop_watch or not _rose(now, start, reward.noise(), t):
        return OK
    return Verdict("alarm", f"reward {start:.3g} -> {now:.3g} while rollout accuracy lost {drop:.0%} of its best")


def _reward_against_validation(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Slow, and the one that counts: reward since the best validation against what validation has become."""
    validation, reward = histories["validation"], histories["reward"]
    if not len(validation):
        return OK
    best = max(range(len(validation)), key=validation.values.__getitem__)
    later = validation.values[best + 1 :]
    then, now = reward.level_at(validation.steps[best]), reward.level(3)
    if len(later) < 2 or then is None or now is None or not _rose(now, then, reward.noise(), t):
        return OK
    evidence = f"reward {then:.3g} -> {now:.3g} while validation {validation.values[best]:.3g} -> {later[-1]:.3g}"
    if validation.values[best] - max(later[-2:]) >= max(t.validation_drop, t.noise * _of_validation(histories)):
        return Verdict("alarm", evidence)
    return Verdict("watch", f"{evidence}: flat") if len(later) >= _FLAT else OK


def _of_validation(histories: SignalHistories) -> float:
    """Sampling error of the difference of two validations; 0 where nobody knows how many answers they had."""
    validation = histories["validation"]
    cases = histories["validated"].last or grain(validation.values)
    return 2**0.5 * sampling_error(sum(validation.values) / len(validation), cases) if cases else 0.0


def _rose(now: float, before: float, noise: float | None, t: Thresholds) -> bool:
    return now - before > max(t.reward_rise * abs(before), t.noise * (noise or 0.0))


def no_spread(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Return every answer of a prompt earns the same: nothing to learn from, whether all is lost or all is solved."""
    share = histories.pooled("no_spread", _GROUPS, unknown=_FEW)
    if share is None:
        return OK
    if share >= t.no_spread:
        if solved(histories, t):
            return Verdict("watch", f"{share:.0%} of the groups have no spread: the training problems are solved")
        return Verdict("alarm", f"{share:.0%} of the groups earn one and the same reward: no learning signal")
    return _spread_gone(histories, share, t)


def _spread_gone(histories: SignalHistories, share: float, t: Thresholds) -> Verdict:
    """Few groups still differ, all of a sudden, in a task that is not solved: the reward has stopped telling."""
    usual = histories["no_spread"].level(_RECENT, _AGO, least=3)
    if usual is None or 1 - usual < _SPREAD_ENOUGH or 1 - share > t.spread_left * (1 - usual) or solved(histories, t):
        return OK
    return Verdict("alarm", f"{1 - share:.0%} of the groups have spread, {1 - usual:.0%} had: the reward hardly tells")
