"""Checks of learning: accuracy, reward against validation, and groups whose rewards differ.

`lost` tells how much of its best level the policy has lost for certain; half of all checks use it.
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

# In standard deviations: the least gain that a loss is a share of, also where the level never rose above its noise.
_IN_NOISE = 8.0
_ENOUGH = 10.0
_SEEN = 8  # observations from which on their scatter is used beside the number of their answers
_LEAST = 1e-6  # a scale below this is a rounding error


@dataclass(frozen=True)
class Loss:
    """The `share` of the best level that is lost (0 within its error), both levels, and their `width` in steps."""

    share: float = 0.0
    best: float = 0.0
    now: float = 0.0
    width: int = 1


class _Error:
    """The standard error of the goal at a given level: as observed, and at least the sampling error of its answers.

    A share of few answers varies most near 0.5; scatter beyond that is assumed to be in proportion to it.
    """

    def __init__(self, histories: SignalHistories, goal: SignalHistory) -> None:
        self._seen = goal.spread()
        self._cases = histories.independent if histories.is_share else None
        self._beyond = 1.0
        level = goal.mean(min(len(goal), NOISE_WINDOW))
        if self._cases is not None and level is not None and len(goal) >= _SEEN:
            self._beyond = max(1.0, self._seen / sampling_error(level, self._cases))

    def at(self, level: float, width: int) -> float:
        """Return the standard error of a mean over `width` observations."""
        return self._of_one(level) / sqrt(width)

    def of_difference(self, best: float, best_width: int, now: float, width: int) -> float:
        """Return the standard error of the difference of two means if both had one level (two-proportion test).

        With the error at `best` itself a fall from 0.5, where shares scatter most, to 0 would be hidden.
        """
        pooled = (best * best_width + now * width) / (best_width + width)
        return self._of_one(pooled) * sqrt(1 / best_width + 1 / width)

    def _of_one(self, level: float) -> float:
        return self._seen if self._cases is None else self._beyond * sampling_error(level, self._cases)

    def tells(self, width: int) -> bool:
        """Return whether `width` observations hold enough answers to be a reference for all later ones."""
        return width > 1 if self._cases is None else width * self._cases >= _ENOUGH


def lost(histories: SignalHistories, t: Thresholds) -> Loss:
    """Return what the policy has lost by now; several checks need it, and it is computed once a step.

    The present level is compared with that of the beginning and with the best of all windows, in several widths; a fall
    must exceed `t.certain` times the standard error of the difference. The best of many windows is best by luck too:
    the expected luck is subtracted, so that it does not rise with noise. A reward that is no share (it can be negative)
    has no natural zero: its loss is measured against what had been gained, and losing all of that counts like losing
    half of an accuracy.
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
    """Yield (level, width) of the beginning, up to `before` observations, and of the best window of each width."""
    for width in (1, *LEVELS):
        if width <= before and error.tells(width):
            yield goal.start(width), width
    for width, mean in goal.bests.items():
        # The maximum of n normal means lies about sqrt(2 log n) standard errors above their mean.
        yield mean - sqrt(2 * log(len(goal) / width)) * error.at(mean, width), width


def _gained(goal: SignalHistory, best: float, error: _Error, t: Thresholds) -> float:
    start = goal.early(t.early)
    return max(best - start if start is not None else 0.0, _IN_NOISE * error.at(best, 1))


# Validations in a row without a new best from which on a rising reward is suspicious.
_FLAT = 4
_RECENT = 20
_AGO = 3
# Groups that a statement about nearly all groups needs: with 5 % that do have spread, 48 show none with p = 0.09.
_GROUPS = 48
_FEW = 3.0  # groups a step, where that is not known
# Groups over which reward and accuracy are correlated, and how far below 0: four standard deviations of 16 groups of 4.
_TELLING = 16
_AGAINST = 0.5
# The share of groups with spread from which on a fall is more than chance: 1 of 16 groups is 0.06.
_SPREAD_ENOUGH = 0.3


def accuracy_collapse(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find the loss of most of the best accuracy, or rollouts far worse than the same policy in evaluations."""
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
    """Find rollouts far below validation: noise or quantization acts in the rollouts alone."""
    rollout, validation = histories.pooled("accuracy"), histories["validation"].last
    if rollout is None or validation is None or validation - rollout < 2 * t.accuracy_points:
        return OK
    if rollout >= t.below_validation * validation:
        return OK
    return Verdict("alarm", f"accuracy {rollout:.3g} in rollouts against {validation:.3g} at validation")


def reward_hacking(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find a reward that rises while the accuracy that it stands for does not, or that prefers wrong answers."""
    return worst([_wrong_earns(histories), _against_accuracy(histories, t), _reward_against_validation(histories, t)])


def _wrong_earns(histories: SignalHistories) -> Verdict:
    """Find rewards by which wrong answers earn more than right ones to the same prompt, before accuracy falls."""
    now = histories.pooled("reward_accuracy", _TELLING)
    if now is None or now > -_AGAINST:
        return OK
    return Verdict("alarm", f"wrong answers earn more than right ones (correlation {now:.2f}): is the sign right?")


def _against_accuracy(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Compare with the accuracy of the very answers that earned the reward: the fast check."""
    reward, accuracy = histories["reward"], histories["accuracy"]
    now, start = reward.level(3), reward.early(t.early)
    if now is None or start is None or not len(accuracy):
        return OK
    drop = lost(histories, t).share
    if drop < t.accuracy_drop_watch or not _rose(now, start, reward.noise(), t):
        return OK
    return Verdict("alarm", f"reward {start:.3g} -> {now:.3g} while rollout accuracy lost {drop:.0%} of its best")


def _reward_against_validation(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Compare the reward since the best validation with validation since then: the slow check, and the decisive one."""
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
    """Return the standard error of the difference of two validations; 0 where their number of answers is unknown."""
    validation = histories["validation"]
    cases = histories["validated"].last or grain(validation.values)
    return 2**0.5 * sampling_error(sum(validation.values) / len(validation), cases) if cases else 0.0


def _rose(now: float, before: float, noise: float | None, t: Thresholds) -> bool:
    return now - before > max(t.reward_rise * abs(before), t.noise * (noise or 0.0))


def no_spread(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find groups whose answers all earn the same: there is nothing to learn from, whether all fail or all succeed."""
    share = histories.pooled("no_spread", _GROUPS, unknown=_FEW)
    if share is None:
        return OK
    if share >= t.no_spread:
        if solved(histories, t):
            return Verdict("watch", f"{share:.0%} of the groups have no spread: the training problems are solved")
        return Verdict("alarm", f"{share:.0%} of the groups earn one and the same reward: no learning signal")
    return _spread_gone(histories, share, t)


def _spread_gone(histories: SignalHistories, share: float, t: Thresholds) -> Verdict:
    """Find a sudden lack of groups with spread in a task that is not solved: the reward tells answers apart no more."""
    usual = histories["no_spread"].level(_RECENT, _AGO, least=3)
    if usual is None or 1 - usual < _SPREAD_ENOUGH or 1 - share > t.spread_left * (1 - usual) or solved(histories, t):
        return OK
    return Verdict("alarm", f"{1 - share:.0%} of the groups have spread, {1 - usual:.0%} had: the reward hardly tells")
