"""Runs on a Ray cluster, one that is there or one of this machine: each a task that goes on when its worker is lost."""

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fp4rl.engines.executors.processes import attempt, interruptible, ready, stalled
from fp4rl.engines.executors.together import together
from fp4rl.lab import heartbeat
from fp4rl.lab.agenda import Agenda
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.resuming import what_follows
from fp4rl.lab.runner import STOPPING, Event, OnEvent, Outcome
from fp4rl.spec.errors import CheckFailed, NotFoundError
from fp4rl.spec.words import counted

_STORE = 100 << 20  # bytes of shared memory; what goes over it are events
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns without it
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
}


class Board:
    """What all tasks write their progress on, and read from whether they are to end; an actor of the cluster."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stopping = False

    def post(self, event: Event) -> bool:
        """Keep an event; return whether the run is to end after its present step."""
        self._events.append(event)
        return self._stopping

    def taken(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        """End every run after its present step."""
        self._stopping = True


@dataclass(frozen=True)
class Order:
    """What a task needs besides its run. `root` and `folder` (where it works) must be there on every node."""

    root: Path
    folder: Path
    code: str
    threads: int
    report_to: tuple[str, ...]


@dataclass
class _Task:
    run: PlannedRun
    lost: int = 0
    heard_at: float = 0.0

    def goes_on(self) -> Event:
        line = f"{self.run.run_id}: its worker was lost ({counted(self.lost, 'time')}); it goes on from its checkpoint"
        return Event(self.run.run_id, "", 0, 0, None, line)


@dataclass(frozen=True)
class RayPool:
    """At most `runs_at_once` runs on the cluster at `address`; on one of this machine, which ends with it, for None.

    A run takes `threads` CPUs for each of its processes, and as many GPUs as processes where the cluster has any. One
    whose worker is lost (killed, out of memory, its node gone) goes on elsewhere from its newest checkpoint, at most
    `retries` times. Ctrl-C, `report_to` and `stall_s` are as in `LocalPool`.
    """

    runs_at_once: int = 2
    address: str | None = None
    threads: int = 1
    report_to: tuple[str, ...] = ()
    stall_s: float | None = None
    retries: int = 3

    def __call__(self, runs: Sequence[PlannedRun], root: Path, on_event: OnEvent) -> Generator[Outcome, None, None]:
        """Yield outcomes as they come. Raises NotFoundError without Ray, or where no cluster answers at `address`."""
        agenda, stopping = Agenda(runs), False
        tasks: dict[Any, _Task] = {}
        with self._cluster(runs) as ray, interruptible() as interrupted:
            board = ray.remote(num_cpus=0)(Board).remote()
            order = Order(root.resolve(), Path.cwd(), code_digest(), self.threads, self.report_to)
            while True:
                if interrupted.is_set() and not stopping:
                    stopping = True
                    agenda.clear()
                    on_event(Event("", STOPPING, 0, 0))
                    ray.get(board.stop.remote())
                while len(tasks) < self.runs_at_once and (run := agenda.take()) is not None:
                    self._submit(tasks, _Task(run), order, board)
                if not tasks:
                    break
                over = [*ray.wait([*tasks], timeout=0.5)[0]]
                _pass_on(ray.get(board.taken.remote()), tasks.values(), on_event)
                for ref in [ref for ref in tasks if ref in over or self._stalled(tasks[ref])]:
                    task = tasks.pop(ref)
                    outcome = _outcome(ref, task, root) if ref in over else _ended(ref, task, root)
                    if outcome is None and task.lost <= self.retries and not stopping:
                        on_event(task.goes_on())
                        self._submit(tasks, task, order, board)
                        continue
                    outcome = outcome or _given_up(task, root)
                    yield outcome
                    yield from agenda.ended(outcome)
            if interrupted.is_set():
                raise KeyboardInterrupt

    def _submit(self, tasks: dict[Any, _Task], task: _Task, order: Order, board: Any) -> None:
        import ray

        task.heard_at = time.monotonic()
        processes = task.run.experiment.processes
        gpus = processes if ray.cluster_resources().get("GPU") else 0
        needs = {"num_cpus": processes * self.threads, "num_gpus": gpus, "max_retries": 0}
        tasks[ray.remote(**needs)(execute).remote(task.run, order, board)] = task

    def _stalled(self, task: _Task) -> bool:
        return self.stall_s is not None and time.monotonic() - task.heard_at > self.stall_s

    @contextmanager
    def _cluster(self, runs: Sequence[PlannedRun]) -> Iterator[Any]:
        """Yield Ray, connected; what was connected here is disconnected, and a cluster of this machine ended."""
        if find_spec("ray") is None:
            raise NotFoundError("--executor ray needs Ray: pip install 'fp4rl[ray]'")
        os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
        import ray

        quiet = {"log_to_driver": False, "logging_level": "error"}
        if self.address is not None:
            try:
                ray.init(address=self.address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                why = str(error).splitlines()[0]
                raise NotFoundError(f"--address {self.address}: no Ray cluster answers there ({why})") from None
        else:
            cpus = self.runs_at_once * self.threads * max(run.experiment.processes for run in runs)
            ray.init(address="local", num_cpus=cpus, object_store_memory=_STORE, include_dashboard=False, **quiet)
        try:
            yield ray
        finally:
            ray.shutdown()  # ends the tasks of this driver


def _pass_on(news: Iterable[Event], tasks: Iterable[_Task], on_event: OnEvent) -> None:
    by_id = {task.run.run_id: task for task in tasks}
    for event in news:
        on_event(event)
        if (task := by_id.get(event.run_id)) is not None:
            task.heard_at = time.monotonic()


def execute(run: PlannedRun, order: Order, board: Any) -> Outcome:
    """Run one task, on whichever node it is; return how it ended."""
    import ray

    stop = False

    def post(event: Event) -> None:
        nonlocal stop
        stop = ray.get(board.post.remote(event))

    if (why := _unlike(order)) is not None:
        return Outcome(run, f"{ray.util.get_node_ip_address()}: {why}", mistake=True)
    os.chdir(order.folder)
    os.environ["OMP_NUM_THREADS"] = str(order.threads)
    if run.experiment.processes > 1:
        return together(run, order.root, order.report_to, post, lambda: stop)
    ready(order.threads)
    return attempt(run, order.root, order.report_to, post, lambda: stop)


def _unlike(order: Order) -> str | None:
    """Return in what this node differs from the machine that gave the order; None where runs come out alike."""
    for folder in (order.root, order.folder):
        if not folder.is_dir():
            return f"there is no {folder} here; every node needs the same folders, by the same paths"
    if code_digest() != order.code:
        return f"fp4rl is of other code here ({code_digest()}, not {order.code}); install the same on every node"
    return None


def _outcome(ref: Any, task: _Task, root: Path) -> Outcome | None:
    """Return how a task ended; None where its worker was lost, which is noted."""
    import ray

    try:
        outcome: Outcome = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise CheckFailed(f"{task.run.run_id}: {str(error).splitlines()[-1]}") from error
    except ray.exceptions.RayError as error:
        task.lost += 1
        folder = run_folder(root, task.run.suite, task.run.run_id).path
        heartbeat.note_end(folder, "lost", str(error).splitlines()[0])  # so that another node may take it over
        return None
    return outcome


def _ended(ref: Any, task: _Task, root: Path) -> Outcome:
    import ray

    ray.cancel(ref, force=True)
    return stalled(task.run, root, time.monotonic() - task.heard_at)


def _given_up(task: _Task, root: Path) -> Outcome:
    folder = run_folder(root, task.run.suite, task.run.run_id).path
    times = counted(task.lost, "time")
    return Outcome(task.run, f"its worker was lost {times}; the same command {what_follows(folder)}")
