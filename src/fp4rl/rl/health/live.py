"""The monitor beside a run: turns findings into evidence and log lines, and says when to end or roll back."""

from collections.abc import Iterable, Mapping

from fp4rl.rl.events import Emit, Message
from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.monitor import Monitor, action
from fp4rl.spec.evidence import HealthFinding
from fp4rl.spec.health import Health, Policy
from fp4rl.spec.records import HealthSummary

History = Iterable[tuple[int, Mapping[str, float]]]
"""(steps done, metrics), in order."""


class LiveMonitor:
    """Monitors one training session. `past` is what was logged before it began: a resumed run is one history.

    Findings are emitted as evidence and as messages; those that are no alarms are for the log alone.

    `verdict` is what the alarms so far ask for: `note` to go on, `stop` or `rollback`.
    """

    def __init__(
        self,
        spec: Health,
        past: History,
        emit: Emit,
    ) -> None:
        self._monitor = Monitor(spec)
        self._emit = emit
        self.decisive: Finding | None = None
        for step, metrics in past:
            self._decide(self._monitor.observe(step, metrics))

    @property
    def verdict(self) -> Policy:
        """Return what to do now."""
        return self.decisive.policy if self.decisive is not None else "note"

    @property
    def alarms(self) -> list[Finding]:
        """Return every alarm so far."""
        return self._monitor.alarms

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of one more step; return whether it is the last one."""
        findings = self._monitor.observe(step, metrics)
        for finding in findings:
            self._emit(_line(finding))
            self._emit(Message(str(finding), log_only=finding.state != "alarm"))
        self._decide(findings)
        return self.verdict != "note"

    def summary(self, rollbacks: int) -> HealthSummary:
        """Summarise for the result: the worst state of the whole run, and its alarms in the order they came."""
        state = "alarm" if self.alarms else self._monitor.state
        return HealthSummary(state=state, alarms=tuple(map(_line, self.alarms)), rollbacks=rollbacks)

    def _decide(self, findings: Iterable[Finding]) -> None:
        wanted = action(findings)
        if self.decisive is None and wanted != "note":
            self.decisive = next(f for f in findings if f.state == "alarm" and f.policy == wanted)


def _line(finding: Finding) -> HealthFinding:
    return HealthFinding(**finding.as_dict())
