"""The monitor of a run: takes metrics step by step, returns findings when a state changes; live, it stops the run."""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from fp4rl.rl.events import Emit, Message
from fp4rl.rl.health.checks import CHECKS, Check
from fp4rl.rl.health.findings import OK, ORDER, Finding, Verdict
from fp4rl.rl.health.histories import SignalHistories, lacking, summary
from fp4rl.rl.health.signals import signals_of
from fp4rl.spec.errors import nearest
from fp4rl.spec.evidence import HealthFinding
from fp4rl.spec.health import Health, Policy, Rule, State, Thresholds
from fp4rl.spec.records import HealthSummary

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}

# Observations without the metric of a rule before a watch reports it.
_PATIENCE = 20


class RuleWatch:
    """Evaluates one rule over a run. A rule whose metric is not logged is reported, never silently passed."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._answer: Verdict | None = None
        self._missed = 0

    @property
    def unasked(self) -> str:
        """Why the rule has had no value so far; empty once it had one."""
        return "" if self._answer is not None else f"{self.rule.metric} was not logged from step {self.rule.step} on"

    def evaluate(self, step: int, values: Mapping[str, float]) -> Verdict:
        """Evaluate the rule on the step's metrics and signals by name. An `at` rule is evaluated once and stays so."""
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
        """Return a watch for a metric that never came; sparse ones (validation) are absent from most steps."""
        self._missed += 1
        if self._answer is not None or self._missed < _PATIENCE:
            return self._answer or OK
        return Verdict("watch", f"no metric {self.rule.metric!r} so far{nearest(self.rule.metric, values)}")


_STRENGTH: Mapping[Policy, int] = {"note": 0, "stop": 1, "rollback": 2}


class LongWatch:
    """Turns a watch that lasts and gets worse into an alarm; a few good steps in between do not end it."""

    def __init__(self) -> None:
        self._since: int | None = None
        self._last = 0
        self._first: list[float] = []

    def evaluate(self, step: int, verdict: Verdict, t: Thresholds) -> Verdict:
        """Return `verdict`, or an alarm in its place; only a verdict with a `severity` can become one."""
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


@dataclass
class _CheckState:
    """The state of one check: its confirmed finding, and for how many steps its verdict has been another."""

    finding: Finding
    bad: int = 0
    good: int = 0
    onset: int = 0
    watch: LongWatch = field(default_factory=LongWatch)


class Monitor:
    """Judges a run step by step. The same metrics give the same findings, so a resumed run replays its metrics.

    A check must report an alarm for `persist` steps in a row; until then it is a watch. An alarm ends after as many
    good steps. Where a line is logged only every few steps, two lines in a row are enough. A watch that lasts and gets
    worse becomes an alarm too.
    """

    def __init__(self, spec: Health | None = None) -> None:
        self.spec = spec or Health()
        self.alarms: list[Finding] = []
        self.steps = 0  # lines seen
        self._histories = SignalHistories()
        self._rules = [RuleWatch(rule) for rule in self.spec.rules]
        names = (*CHECKS, *map(str, self.spec.rules))
        self._states = {name: _CheckState(Finding(name, "ok", 0, 0, "")) for name in names}

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Take the metrics of a step; return the changes: a watch or alarm that begins, or one that is over (`ok`)."""
        self.steps += 1
        signals = signals_of(metrics)
        self._histories.add(step, signals)
        news = [self._evaluate(step, name, check) for name, check in CHECKS.items()]
        for watch in self._rules:
            verdict = watch.evaluate(step, {**signals, **metrics})
            news.append(self._settle(step, str(watch.rule), verdict, 1, watch.rule.action))
        findings = [finding for finding in news if finding is not None]
        self.alarms += [finding for finding in findings if finding.state == "alarm"]
        return findings

    def findings(self) -> list[Finding]:
        """Return the present finding of every check and rule, the most serious first, those not judged last."""
        findings = [self._with_evidence(s.finding) for s in self._states.values()]
        return sorted(findings, key=lambda f: -ORDER[f.state])

    @property
    def state(self) -> State:
        """The most serious state now."""
        return self.findings()[0].state

    @property
    def healthy(self) -> bool:
        """Whether there was no alarm so far."""
        return not self.alarms

    def _with_evidence(self, finding: Finding) -> Finding:
        if finding.state != "ok":
            return finding
        rule = next((watch for watch in self._rules if str(watch.rule) == finding.check), None)
        missing = rule.unasked if rule is not None else lacking(self._histories, CHECKS[finding.check].needs)
        if missing:
            return replace(finding, state="not judged", evidence=missing)
        held = "not broken" if rule else summary(self._histories, CHECKS[finding.check].signals)
        return replace(finding, evidence=held)

    def _evaluate(self, step: int, name: str, check: Check) -> Finding | None:
        verdict = check.function(self._histories, self.spec.thresholds)
        verdict = self._states[name].watch.evaluate(step, verdict, self.spec.thresholds)
        needed = 1 if check.at_once else self._persist
        return self._settle(step, name, verdict, needed, self.spec.policy_of(name))

    @property
    def _persist(self) -> int:
        """The number of observations that span `persist` steps; at least two, unless `persist` is 1."""
        persist = self.spec.thresholds.persist
        return max(min(persist, 2), ceil(persist / self._histories.spacing))

    def _settle(self, step: int, name: str, verdict: Verdict, needed: int, policy: Policy) -> Finding | None:
        """Return the new finding if this verdict changes the state of `name`, else None; evidence is updated anyway."""
        check = self._states[name]
        if verdict.state == "alarm":
            check.onset = step if check.bad == 0 else check.onset
            check.bad, check.good = check.bad + 1, 0
        else:
            check.bad, check.good = 0, check.good + 1
        before = check.finding
        state = verdict.state
        if state == "alarm" and check.bad < needed and before.state != "alarm":
            state = "watch"
        if before.state == "alarm" and state != "alarm" and check.good < self._persist:
            return None  # one good step does not end an alarm
        since = check.onset if verdict.state == "alarm" else step
        if state == before.state:
            check.finding = replace(before, evidence=verdict.evidence)
            return None
        check.finding = Finding(name, state, step, since, verdict.evidence or "over", policy)
        return check.finding


def action(findings: Iterable[Finding]) -> Policy:
    """Return the strongest policy among alarms; `note` when there is none."""
    return max((f.policy for f in findings if f.state == "alarm"), key=_STRENGTH.__getitem__, default="note")


def replay(
    steps: Iterable[tuple[int, Mapping[str, float]]], spec: Health | None = None
) -> tuple[Monitor, list[Finding]]:
    """Return a monitor that has seen a whole log, and all findings on the way."""
    monitor = Monitor(spec)
    findings = [finding for step, metrics in steps for finding in monitor.observe(step, metrics)]
    return monitor, findings


def last_healthy(checkpoints: Iterable[int], findings: Iterable[Finding]) -> int | None:
    """Return the latest of `checkpoints` (steps) before the onset of every alarm among `findings`; None without one."""
    onset = min((f.since for f in findings if f.state == "alarm"), default=None)
    return max((step for step in checkpoints if onset is None or step < onset), default=None)


class LiveMonitor:
    """Monitors one training session. `history` holds the metrics logged before it, if the run was resumed.

    Findings are emitted as evidence and as messages; all but alarms go to the log alone.
    """

    def __init__(self, spec: Health, history: Iterable[tuple[int, Mapping[str, float]]], emit: Emit) -> None:
        self._monitor = Monitor(spec)
        self._emit = emit
        self.decisive: Finding | None = None
        for step, metrics in history:
            self._decide(self._monitor.observe(step, metrics))

    @property
    def verdict(self) -> Policy:
        """What the alarms so far require: `note` (go on), `stop` or `rollback`."""
        return self.decisive.policy if self.decisive is not None else "note"

    @property
    def alarms(self) -> list[Finding]:
        """Return every alarm so far."""
        return self._monitor.alarms

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of a step; return whether the run must end after it."""
        findings = self._monitor.observe(step, metrics)
        for finding in findings:
            self._emit(HealthFinding(**vars(finding)))
            self._emit(Message(str(finding), log_only=finding.state != "alarm"))
        self._decide(findings)
        return self.verdict != "note"

    def summary(self, rollbacks: int) -> HealthSummary:
        """Return the summary for the result: the worst state of the whole run, and its alarms in order."""
        state = "alarm" if self.alarms else self._monitor.state
        alarms = tuple(HealthFinding(**vars(finding)) for finding in self.alarms)
        return HealthSummary(state=state, alarms=alarms, rollbacks=rollbacks)

    def _decide(self, findings: Iterable[Finding]) -> None:
        wanted = action(findings)
        if self.decisive is None and wanted != "note":
            self.decisive = next(f for f in findings if f.state == "alarm" and f.policy == wanted)
