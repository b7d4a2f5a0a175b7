"""The order of runs that take weights from each other: none begins before those that it needs are done."""

from collections.abc import Sequence

from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runner import Outcome


class Agenda:
    """Runs still to begin, in their order. What a run needs and is not among them is taken to be done."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._waiting = list(runs)
        self._undone = {run.run_id for run in runs}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> PlannedRun | None:
        """Take the first run that may begin; None where all wait for some that are under way."""
        for run in self._waiting:
            if self._undone.isdisjoint(run.needs.values()):
                self._waiting.remove(run)
                return run
        return None

    def clear(self) -> None:
        """Drop all that have not begun."""
        self._waiting.clear()

    def ended(self, outcome: Outcome) -> list[Outcome]:
        """Note the end of a run; return the outcomes of those that cannot begin any more, since it failed."""
        if outcome.error is None:
            self._undone.discard(outcome.run.run_id)
            return []
        how = "was interrupted" if outcome.interrupted else "failed"
        lost = [
            Outcome(run, f"not begun: {key} {outcome.run.run_id} {how} ({outcome.error})")
            for run in self._waiting
            for key, needed in run.needs.items()
            if needed == outcome.run.run_id
        ]
        lost = list({blocked.run.run_id: blocked for blocked in lost}.values())
        for blocked in lost:
            self._waiting.remove(blocked.run)
        return [each for blocked in lost for each in (blocked, *self.ended(blocked))]
