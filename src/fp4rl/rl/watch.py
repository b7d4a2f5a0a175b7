"""The monitor beside a run: every step's metrics go in; findings become evidence and log lines, and may end the run."""

from collections.abc import Callable, Iterable, Mapping

from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.monitor import Monitor, action
from fp4rl.spec.evidence import HealthFinding
from fp4rl.spec.health import Health, Policy
from fp4rl.spec.records import HealthSummary

History = Iterable[tuple[int, Mapping[str, float]]]
"""(steps done, metrics), in order."""


class Watch:
    """One attempt at a run. `past` is what was logged before it began: a resumed run is judged as a whole.

    `say` hears alarms, `note` the other findings (as `say` does where it is not given).

    `verdict` is what the alarms so far ask for: `note` to go on, `stop` or `rollback`.
    """

    def __init__(
        self,
        spec: Health,
        past: History,
        record: Callable[[HealthFinding], None],
        say: Callable[[str], None],
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._monitor = Monitor(spec)
        self._record = record
        self._say = say
        self._note = note or say
        self.decisive: Finding | None = None
        for step, metrics in past:
            self._decide(self._monitor.observe(step, metrics))

    @property
    def verdict(self) -> Policy:
        """What to do now."""
        return self.decisive.policy if self.decisive is not None else "note"

    @property
    def alarms(self) -> list[Finding]:
        """Every alarm so far."""
        return self._monitor.alarms

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """One more step; returns whether it is the last one."""
        findings = self._monitor.observe(step, metrics)
        for finding in findings:
            self._record(_line(finding))
            (self._say if finding.state == "alarm" else self._note)(str(finding))
        self._decide(findings)
        return self.verdict != "note"

    def summary(self, rollbacks: int) -> HealthSummary:
        """For the result: the worst state of the whole run, and its alarms in the order they came."""
        state = "alarm" if self.alarms else self._monitor.state
        return HealthSummary(state=state, alarms=tuple(map(_line, self.alarms)), rollbacks=rollbacks)

    def _decide(self, findings: Iterable[Finding]) -> None:
        wanted = action(findings)
        if self.decisive is None and wanted != "note":
            self.decisive = next(f for f in findings if f.state == "alarm" and f.policy == wanted)


def _line(finding: Finding) -> HealthFinding:
    return HealthFinding(**finding.as_dict())
