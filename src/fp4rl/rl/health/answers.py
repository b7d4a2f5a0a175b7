"""Checks on what the policy writes: how long, how often cut off, how often nothing or the same again."""

from fp4rl.rl.health.courses import Courses
from fp4rl.rl.health.findings import OK, Verdict, worst
from fp4rl.rl.health.loss import lost
from fp4rl.spec.health import Thresholds


def length_explosion(courses: Courses, t: Thresholds) -> Verdict:
    """Longer than the run's own early median *and* worse for it: long reasoning that pays off is no illness."""
    now, start = courses.pooled("length"), courses["length"].early(t.early)
    if now is None or start is None or start <= 0 or now < t.length_ratio * start:
        return OK
    cut, drop = courses.pooled("truncated"), lost(courses, t).share
    cut_start = courses["truncated"].early(t.early) or 0.0
    evidence = f"answers of {now:.4g} tokens, {now / start:.2g}x the early median of {start:.4g}"
    if cut is not None and cut >= max(t.truncated, cut_start + t.truncated / 2):
        return Verdict("alarm", f"{evidence}; {cut:.0%} cut off")
    if drop >= t.harm:
        return Verdict("alarm", f"{evidence}; accuracy lost {drop:.0%} of its best")
    harmful = cut is not None and cut >= max(t.truncated / 2, cut_start + t.truncated / 4)
    return Verdict("watch", f"{evidence}; {cut:.0%} cut off", severity=now / start) if harmful else OK


def dead_rollouts(courses: Courses, t: Thresholds) -> Verdict:
    """Answers nobody can learn from: nearly all cut off, many empty, or the same few tokens again and again."""
    return worst([_all_cut(courses, t), _empty(courses, t), _repeated(courses, t)])


def _all_cut(courses: Courses, t: Thresholds) -> Verdict:
    cut, start = courses.pooled("truncated"), courses["truncated"].early(t.early)
    if cut is None or cut < t.truncated:
        return OK
    evidence = f"{cut:.0%} of the answers are cut off at the length limit"
    if cut >= t.dead:
        return Verdict("alarm", evidence)
    if start is None or cut < start + t.truncated / 2:
        return OK  # as many as ever: the limit is short, and no state of the policy
    return Verdict("alarm", f"{evidence}, {start:.0%} in the beginning")


def _empty(courses: Courses, t: Thresholds) -> Verdict:
    empty, length = courses.pooled("empty"), courses.pooled("length")
    if empty is not None and empty >= t.empty:
        return Verdict("alarm", f"{empty:.0%} of the answers are empty")
    start = courses["length"].early(t.early)
    # One token is the end token alone. A task whose answers are that short from the start is no illness.
    if length is not None and length <= 1.5 and (start is None or start > 3.0):
        return Verdict("alarm", f"answers have {length:.2g} tokens on average: most are empty")
    return OK


def _repeated(courses: Courses, t: Thresholds) -> Verdict:
    now, start = courses.pooled("repetition"), courses["repetition"].early(t.early)
    if now is None or now < t.repetition or (start is not None and now < 2 * start and start < t.repetition):
        return OK
    beside = "" if start is None else f", {start:.0%} in the beginning"
    return Verdict("alarm", f"{now:.0%} of the 4-grams in an answer are repeated{beside}")
