"""Checks on whether the policy learns what it should: accuracy, reward against validation, and rewards that differ."""

from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.histories import SignalHistories, grain, sampling_error, solved
from fp4rl.rl.health.loss import lost
from fp4rl.spec.health import Thresholds

# Validations in a row without a new best before a rising reward looks suspicious.
_FLAT = 4
_RECENT = 20
_AGO = 3
# Groups that must all lack spread before it is said that nearly all do: 0.95 ** 48 is 0.09, three times in a row.
_GROUPS = 48
_FEW = 3.0  # groups a step, where nobody knows
# A share of groups with spread from which a fall can be told from chance: 1 of 16 groups is 0.06.
_SPREAD_ENOUGH = 0.3


def accuracy_collapse(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Most of the best accuracy is gone, or the rollouts are far worse than the same policy when it is evaluated."""
    return worst([_against_its_best(histories, t), _against_validation(histories, t)])


def _against_its_best(histories: SignalHistories, t: Thresholds) -> Verdict:
    loss = lost(histories, t)
    if loss.share < t.harm:
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
    return worst([_against_accuracy(histories, t), _reward_against_validation(histories, t)])


def _against_accuracy(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Fast: accuracy of the very answers that earned the reward."""
    reward, accuracy = histories["reward"], histories["accuracy"]
    now, start = reward.level(3), reward.early(t.early)
    if now is None or start is None or not len(accuracy):
        return OK
    drop = lost(histories, t).share
    if drop < t.harm or not _rose(now, start, reward.noise(), t):
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
    """Every answer of a prompt earns the same: nothing to learn from, whether all is lost or all is solved."""
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
