"""A state that is bad but not bad enough, and stays, and gets worse: after a while that is an alarm."""

from fp4rl.rl.health.findings import Verdict
from fp4rl.spec.health import Thresholds


class LongWatch:
    """The watch of one check: since when it stands, and how severe it was in the beginning.

    A few steps in between that are well do not end it.
    """

    def __init__(self) -> None:
        self._since: int | None = None
        self._last = 0
        self._first: list[float] = []

    def judge(self, step: int, verdict: Verdict, t: Thresholds) -> Verdict:
        """`verdict`, or an alarm in its place. Only what comes with a `severity` can become one."""
        if verdict.state == "ok" or verdict.severity is None:
            if self._since is not None and step - self._last > t.persist:
                self._since = None
            return verdict
        if self._since is None:
            self._since, self._first = step, []
        self._last = step
        if len(self._first) < t.persist:
            self._first.append(verdict.severity)
        at_first = sum(self._first) / len(self._first)
        if verdict.state == "alarm" or step - self._since < t.watched or verdict.severity < t.worsened * at_first:
            return verdict
        return Verdict("alarm", f"{verdict.evidence}; so since step {self._since}, and worse", verdict.severity)
