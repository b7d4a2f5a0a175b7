"""Red flags of one's own: `stop if METRIC op VALUE at step N`."""

import operator
from collections.abc import Callable, Mapping

from fp4rl.rl.health.findings import OK, Verdict
from fp4rl.spec.errors import nearest
from fp4rl.spec.health import Rule

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}

# Observations without the metric of a rule before that is said.
_PATIENCE = 20


class RuleWatch:
    """One rule over a run. A rule that could not be asked because nobody logs its metric says so instead of nothing."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._answer: Verdict | None = None
        self._missed = 0

    @property
    def unasked(self) -> str:
        """Why the rule has had no value to look at so far; empty once it had one."""
        return "" if self._answer is not None else f"{self.rule.metric} was not logged from step {self.rule.step} on"

    def evaluate(self, step: int, values: Mapping[str, float]) -> Verdict:
        """`values`: this step's metrics and signals by name. An `at` rule asks once and keeps its answer."""
        rule = self.rule
        if step < rule.step:
            return OK
        if rule.when == "at" and self._answer is not None:
            return self._answer
        value = values.get(rule.metric)
        if value is None:
            return self._missing(values)
        broken = _OPERATORS[rule.op](value, rule.value)
        self._answer = Verdict("alarm", f"{rule.metric} is {value:.4g}") if broken else OK
        return self._answer

    def _missing(self, values: Mapping[str, float]) -> Verdict:
        """Sparse metrics (validation) are absent from most steps; one that never came is a name nobody logs."""
        self._missed += 1
        if self._answer is not None or self._missed < _PATIENCE:
            return self._answer or OK
        return Verdict("watch", f"no metric {self.rule.metric!r} so far{nearest(self.rule.metric, values)}")
