"""The live display of running runs: what each is doing, its last numbers, and the time left for all."""

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fp4rl.cli.terminal import styled
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runner import STOPPING, Event, Outcome

# The stages of a run before and after its steps, counted as so many steps: only for the bar and the time left.
_AROUND = 4
_BEAT_S = 15.0  # seconds between lines on a pipe


class Display:
    """Shows the events of running runs; on a pipe it prints lines instead, regularly and for finished runs."""

    def __init__(self, runs: Sequence[PlannedRun], console: Console) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._printed: set[object] = set()
        self._steps = {run.run_id: run.experiment.training.steps + _AROUND for run in runs}
        self._done = dict.fromkeys(self._runs, 0.0)
        self._active: dict[str, Event] = {}
        self._numbers: dict[str, dict[str, float]] = {}
        self._started = time.monotonic()
        self._finished = self._failed = 0
        self._last_beat = float("-inf")
        self._console = console
        self._progress = Progress(
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self._bar = self._progress.add_task("runs", total=len(runs), left="")
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)

    def shown(self) -> AbstractContextManager[object]:
        """Show the display inside the `with`; nothing on a pipe."""
        return self._live if self._console.is_terminal else nullcontext()

    def on_event(self, event: Event) -> None:
        """Update the display for an event of a run."""
        if event.stage == STOPPING:
            line = "ending: each run keeps a checkpoint after the step it is in; Ctrl-C now ends them at once"
            self._console.print(line)
            return
        if event.line is not None:
            self._say(event.run_id, event.line)
            return
        self._active[event.run_id] = event
        if event.metrics is not None:
            self._numbers[event.run_id] = event.metrics
        if event.stage == "training":
            self._done[event.run_id] = event.done + _AROUND / 2
        if not self._console.is_terminal and time.monotonic() - self._last_beat > _BEAT_S:
            self._last_beat = time.monotonic()
            self._console.print("; ".join(map(self._doing, self._active.values())), soft_wrap=True)

    def _say(self, run_id: str, line: str) -> None:
        """Print a line once for each run and kind of line, whatever its numbers; once for all runs that share it."""
        kind = run_id, re.sub(r"\d[\d.]*", "#", line)
        if not self._printed & {kind, line}:
            self._console.print(styled(("warning", "yellow"), f": {_name(self._runs[run_id])}: {line}"))
        self._printed |= {kind, line}

    def _doing(self, event: Event) -> str:
        where = f" {event.done}/{event.total}" if event.total else ""
        return f"{_name(self._runs[event.run_id])}: {event.stage}{where}"

    def on_outcome(self, outcome: Outcome) -> None:
        """Update the display for the end of a run."""
        run = outcome.run
        self._active.pop(run.run_id, None)
        self._done[run.run_id] = self._steps[run.run_id]
        self._finished += outcome.error is None
        self._failed += outcome.error is not None
        self._progress.update(self._bar, completed=self._finished)
        if outcome.mistake:
            return  # printed once, at the end, for all runs that share it
        if outcome.error is not None:
            how = ("interrupted", "yellow") if outcome.interrupted else ("failed", "red")
            line = styled(how, f" {_name(run)}: {outcome.error}")
            self._console.print(line, soft_wrap=not self._console.is_terminal)
        elif not self._console.is_terminal:
            failed = f"{self._failed} failed" if self._failed else ""
            rest = ", ".join(p for p in (f"{self._finished} of {len(self._runs)}", failed, self._left()) if p)
            self._console.print(f"finished {_name(run)} ({rest})")

    def _picture(self) -> RenderableType:
        table = Table(box=None, padding=(0, 1), show_edge=False)
        table.add_column("arm", no_wrap=True, overflow="ellipsis", max_width=16)
        for name in ("seed", "step", "accuracy", "entropy", "length"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("doing", no_wrap=True, overflow="ellipsis", max_width=18)
        for run_id, event in sorted(self._active.items()):
            run, numbers = self._runs[run_id], self._numbers.get(run_id, {})
            training = event.stage == "training"
            table.add_row(
                run.arm,
                str(run.seed),
                f"{event.done}/{event.total}" if training else "-",
                _shown(numbers.get("accuracy/rollout"), ".1%"),
                _shown(numbers.get("entropy"), ".3f"),
                _shown(numbers.get("response_length/mean"), ".1f"),
                event.stage if training or not event.total else f"{event.stage} {event.done}/{event.total}",
            )
        self._progress.update(self._bar, left=self._left())
        return Group(table, self._progress)

    def _left(self) -> str:
        share = sum(self._done.values()) / max(sum(self._steps.values()), 1)
        if share < 0.02 or share == 1:
            return ""
        seconds = (time.monotonic() - self._started) * (1 - share) / share
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _name(run: PlannedRun) -> str:
    return f"{run.arm}, seed {run.seed}"
