"""Checks on entropy, always against the run's own history: healthy runs lose 80 % of it, and bare thresholds
misfire."""

from math import exp, log

from fp4rl.rl.health.findings import OK, Verdict
from fp4rl.rl.health.histories import SignalHistories, rising
from fp4rl.rl.health.history import SignalHistory, trend
from fp4rl.rl.health.loss import lost
from fp4rl.spec.health import Thresholds

# The trend is drawn through observations that ended this long ago, so that a collapse cannot bend its own yardstick.
_AGO = 5
_TREND_WINDOW = 30
# Below this entropy is a rounding error, in nats a token.
_FLOOR = 1e-6
_LARGEST_LOG = 709.0  # exp of more than that is no float


def entropy_collapse(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Far below where its own trend was heading, little of it left, and accuracy not rising meanwhile."""
    history = histories["entropy"]
    now, start = histories.pooled("entropy"), history.early(t.early)
    expected = _expected(history)
    if now is None or start is None or expected is None or start <= _FLOOR or now > t.entropy_left * start:
        return OK
    fall, noise = expected - log(max(now, _FLOOR)), _log_noise(history)
    if fall < max(log(t.entropy_drop), 2 * t.noise * noise):
        return OK
    below = exp(min(fall, _LARGEST_LOG))
    evidence = f"entropy {now:.3g} nats, {below:.2g}x below its own trend, {now / start:.0%} of its early {start:.3g}"
    return Verdict("watch" if rising(histories) else "alarm", evidence)


def entropy_explosion(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Rising while accuracy falls, or rising so far that accuracy will follow."""
    history = histories["entropy"]
    now, start, lowest = histories.pooled("entropy"), history.early(t.early), history.lowest
    if now is None or start is None or lowest is None or min(now, start) <= _FLOOR:
        return OK
    drop = lost(histories, t).share
    if now >= t.entropy_rise * lowest and drop >= t.harm:
        return Verdict(
            "alarm", f"entropy {now:.3g} nats, up from {lowest:.3g}, while accuracy lost {drop:.0%} of its best"
        )
    if now >= t.entropy_burst * start and not rising(histories):
        return Verdict(
            "alarm", f"entropy {now:.3g} nats, {now / start:.2g}x its early median, and accuracy does not rise"
        )
    return OK


def _logs(history: SignalHistory, ago: int = 0) -> list[float]:
    values = history.values[: len(history.values) - ago][-_TREND_WINDOW:]
    return [log(max(value, _FLOOR)) for value in values]


def _expected(history: SignalHistory) -> float | None:
    """Log-entropy that the trend up to `_AGO` observations ago leads to expect now. A rising trend counts as flat."""
    line = trend(_logs(history, _AGO))
    return None if line is None else line[0] + min(line[1], 0.0) * _AGO


def _log_noise(history: SignalHistory) -> float:
    logs = SignalHistory()
    for step, value in enumerate(_logs(history, _AGO)):
        logs.add(step, value)
    return logs.noise() or 0.0
