"""What the monitor reports: a state with its evidence."""

from dataclasses import dataclass

from fp4rl.spec.health import Policy, State

ORDER: dict[State, int] = {"not judged": -1, "ok": 0, "watch": 1, "alarm": 2}


@dataclass(frozen=True)
class Verdict:
    """The result of one check at one step: a state, and the numbers that show it.

    `severity`: for a watch that becomes an alarm when it lasts and grows; None for one that does not.
    """

    state: State
    evidence: str = ""
    severity: float | None = None


OK = Verdict("ok")


@dataclass(frozen=True)
class Finding:
    """A check's state from `step` on. `since`: the first step of what led to it. `policy`: what an alarm does.

    `not judged` is not the result of a check: it means that the signals of the check are not logged.
    """

    check: str
    state: State
    step: int
    since: int
    evidence: str
    policy: Policy = "note"

    def __str__(self) -> str:
        onset = f" (since step {self.since})" if self.since != self.step else ""
        return f"step {self.step}: {self.check} {self.state}{onset}: {self.evidence}"


def worst(verdicts: list[Verdict]) -> Verdict:
    """Return the most serious of several, the first of equals."""
    return max(verdicts, key=lambda v: ORDER[v.state], default=OK)
