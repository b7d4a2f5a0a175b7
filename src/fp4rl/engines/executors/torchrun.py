"""Runs one after another, each trained by all the processes of a launcher (torchrun); the first one alone speaks."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4rl.engines.executors.processes import attempt
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runner import OnEvent, Outcome
from fp4rl.spec.errors import CheckFailed


@dataclass(frozen=True)
class TorchrunExecutor:
    """In the first process: what `LocalPool` is where there is one. The first run that fails ends the series.

    `report_to`: see `lab.work.execute_run`.
    """

    report_to: tuple[str, ...] = ()

    def __call__(self, runs: Sequence[PlannedRun], root: Path, on_event: OnEvent) -> Generator[Outcome, None, None]:
        """Outcomes as they come."""
        for run in runs:
            outcome = attempt(run, root, self.report_to, on_event)
            yield outcome
            if outcome.error is not None:  # the other processes are still in the middle of it
                return


def follow(root: Path) -> None:
    """In every other process: take part in what the first one runs. Raises CheckFailed where this share fails."""
    from fp4rl.rl import processes

    runs: list[PlannedRun] = processes.from_first([])
    for run in runs:
        outcome = attempt(run, root, (), lambda event: None)  # noqa: ARG005
        if outcome.error is not None:
            raise CheckFailed(f"process {processes.rank()}, {run.run_id}: {outcome.error}")
