"""Runs one after another, each trained by all processes of a launcher (torchrun); only the first reports."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4rl.engines.executors.processes import attempt
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runner import OnEvent, Outcome
from fp4rl.spec.errors import CheckFailed


@dataclass(frozen=True)
class TorchrunExecutor:
    """Runs all in turn, instead of `LocalPool`; the first failure ends the series. `report_to`: see `execute_run`."""

    report_to: tuple[str, ...] = ()

    def __call__(self, runs: Sequence[PlannedRun], root: Path, on_event: OnEvent) -> Generator[Outcome, None, None]:
        """Yield outcomes as they come."""
        for run in runs:
            outcome = attempt(run, root, self.report_to, on_event)
            yield outcome
            if outcome.error is not None:  # the other processes are still inside this run
                return


def follow(root: Path) -> None:
    """Take part, in every other process, in the runs of the first one. Raises CheckFailed where this part fails."""
    from fp4rl.rl import processes

    runs: list[PlannedRun] = processes.from_first([])
    for run in runs:
        outcome = attempt(run, root, (), lambda event: None)  # noqa: ARG005
        if outcome.error is not None:
            raise CheckFailed(f"process {processes.rank()}, {run.run_id}: {outcome.error}")
