"""Checks on what the policy writes: how long, how often cut off, how often nothing or the same again."""

from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.histories import SignalHistories
from fp4rl.rl.health.loss import lost
from fp4rl.spec.health import Thresholds


def length_explosion(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Longer than the run's own early median *and* worse for it: long reasoning that pays off is no illness."""
    now, start = histories.pooled("length"), histories["length"].early(t.early)
    if now is None or start is None or start <= 0 or now < t.length_ratio * start:
        return OK
    cut, drop = histories.pooled("truncated"), lost(histories, t).share
    cut_start = histories["truncated"].early(t.early) or 0.0
    evidence = f"answers of {now:.4g} tokens, {now / start:.2g}x the early median of {start:.4g}"
    if cut is not None and cut >= max(t.truncated, cut_start + t.truncated / 2):
        return Verdict("alarm", f"{evidence}; {cut:.0%} cut off")
    if drop >= t.harm:
        return Verdict("alarm", f"{evidence}; accuracy lost {drop:.0%} of its best")
    harmful = cut is not None and cut >= max(t.truncated / 2, cut_start + t.truncated / 4)
    return Verdict("watch", f"{evidence}; {cut:.0%} cut off", severity=now / start) if harmful else OK


def dead_rollouts(histories: SignalHistories, t: Thresholds) -> Verdict:
    """Answers nobody can learn from: nearly all cut off, many empty, or the same few tokens again and again."""
    return worst([_all_cut(histories, t), _empty(histories, t), _repeated(histories, t)])


def _all_cut(histories: SignalHistories, t: Thresholds) -> Verdict:
    cut, start = histories.pooled("truncated"), histories["truncated"].early(t.early)
    if cut is None or cut < t.truncated:
        return OK
    evidence = f"{cut:.0%} of the answers are cut off at the length limit"
    if cut >= t.dead:
        return Verdict("alarm", evidence)
    if start is None or cut < start + t.truncated / 2:
        return OK  # as many as ever: the limit is short, and no state of the policy
    return Verdict("alarm", f"{evidence}, {start:.0%} in the beginning")


def _empty(histories: SignalHistories, t: Thresholds) -> Verdict:
    empty, length = histories.pooled("empty"), histories.pooled("length")
    if empty is not None and empty >= t.empty:
        return Verdict("alarm", f"{empty:.0%} of the answers are empty")
    start = histories["length"].early(t.early)
    # One token is the end token alone. A task whose answers are that short from the start is no illness.
    if length is not None and length <= 1.5 and (start is None or start > 3.0):
        return Verdict("alarm", f"answers have {length:.2g} tokens on average: most are empty")
    return OK


def _repeated(histories: SignalHistories, t: Thresholds) -> Verdict:
    now, start = histories.pooled("repetition"), histories["repetition"].early(t.early)
    if now is None or now < t.repetition or (start is not None and now < 2 * start and start < t.repetition):
        return OK
    beside = "" if start is None else f", {start:.0%} in the beginning"
    return Verdict("alarm", f"{now:.0%} of the 4-grams in an answer are repeated{beside}")
