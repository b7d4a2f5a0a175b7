"""Checks of the answers: their length, how many are cut off, empty or repetitive, and their entropy."""

from math import exp, log

from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.histories import SignalHistories, SignalHistory, rising, trend
from fp4rl.rl.health.learning import lost
from fp4rl.spec.health import Thresholds


def length_explosion(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find answers that grew far beyond the run's early median *and* became worse; long answers that help are fine."""
    now, start = histories.pooled("length"), histories["length"].early(t.early)
    if now is None or start is None or start <= 0 or now < t.length_ratio * start:
        return OK
    cut, drop = histories.pooled("truncated"), lost(histories, t).share
    cut_start = histories["truncated"].early(t.early) or 0.0
    evidence = f"answers of {now:.4g} tokens, {now / start:.2g}x the early median of {start:.4g}"
    if cut is not None and cut >= max(t.truncated, cut_start + t.truncated / 2):
        return Verdict("alarm", f"{evidence}; {cut:.0%} cut off")
    if drop >= t.accuracy_drop_watch:
        return Verdict("alarm", f"{evidence}; accuracy lost {drop:.0%} of its best")
    telling = cut is not None and cut >= max(t.truncated / 2, cut_start + t.truncated / 4)
    return Verdict("watch", f"{evidence}; {cut:.0%} cut off", severity=now / start) if telling else OK


def dead_rollouts(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find answers that cannot be learned from: nearly all cut off, many empty, or the same tokens over and over."""
    return worst([_all_cut(histories, t), _empty(histories, t), _repeated(histories, t)])


def _all_cut(histories: SignalHistories, t: Thresholds) -> Verdict:
    cut, start = histories.pooled("truncated"), histories["truncated"].early(t.early)
    if cut is None or cut < t.truncated:
        return OK
    evidence = f"{cut:.0%} of the answers are cut off at the length limit"
    if cut >= t.dead:
        return Verdict("alarm", evidence)
    if start is None or cut < start + t.truncated / 2:
        return OK  # as many as at the start: the limit is short, the policy has not changed
    return Verdict("alarm", f"{evidence}, {start:.0%} in the beginning")


def _empty(histories: SignalHistories, t: Thresholds) -> Verdict:
    empty, length = histories.pooled("empty"), histories.pooled("length")
    if empty is not None and empty >= t.empty:
        return Verdict("alarm", f"{empty:.0%} of the answers are empty")
    start = histories["length"].early(t.early)
    # One token is the end token alone; but a task may have answers as short as that from the start.
    if length is not None and length <= 1.5 and (start is None or start > 3.0):
        return Verdict("alarm", f"answers have {length:.2g} tokens on average: most are empty")
    return OK


def _repeated(histories: SignalHistories, t: Thresholds) -> Verdict:
    now, start = histories.pooled("repetition"), histories["repetition"].early(t.early)
    if now is None or now < t.repetition or (start is not None and now < 2 * start and start < t.repetition):
        return OK
    beside = "" if start is None else f", {start:.0%} in the beginning"
    return Verdict("alarm", f"{now:.0%} of the 4-grams in an answer are repeated{beside}")


# The trend is fitted to observations up to this many ago, so that a collapse does not bend the trend that it is
# compared with.
_AGO = 5
_TREND_WINDOW = 30
# In nats a token; a lower entropy is a rounding error.
_FLOOR = 1e-6
_LARGEST_LOG = 709.0  # exp of more than that is no float


def entropy_collapse(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Find entropy far below its own trend and with little of it left; a watch while accuracy rises, else an alarm."""
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
    """Find entropy that rises while accuracy falls, or that rises so far that accuracy will fall."""
    history = histories["entropy"]
    now, start, lowest = histories.pooled("entropy"), history.early(t.early), history.lowest
    if now is None or start is None or lowest is None or min(now, start) <= _FLOOR:
        return OK
    drop = lost(histories, t).share
    if now >= t.entropy_rise * lowest and drop >= t.accuracy_drop_watch:
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
    """Return the log-entropy now by the trend until `_AGO` observations ago; a rising trend counts as flat."""
    line = trend(_logs(history, _AGO))
    return None if line is None else line[0] + min(line[1], 0.0) * _AGO


def _log_noise(history: SignalHistory) -> float:
    logs = SignalHistory()
    for step, value in enumerate(_logs(history, _AGO)):
        logs.add(step, value)
    return logs.noise() or 0.0
