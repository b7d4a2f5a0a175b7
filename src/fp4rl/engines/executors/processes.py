"""Runs in parallel on this machine: spawned processes, each with its own threads and its own torch."""

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from fp4rl.engines.environment import choose_backend
from fp4rl.engines.executors.deaths import described, die_with
from fp4rl.engines.executors.devices import devices_here
from fp4rl.engines.executors.spawned import spawned
from fp4rl.engines.executors.together import together
from fp4rl.engines.rollout.samplers import add_samplers
from fp4rl.lab import heartbeat
from fp4rl.lab.agenda import Agenda
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.guards import FATAL
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.resuming import what_follows
from fp4rl.lab.runner import STOPPING, Event, OnEvent, Outcome
from fp4rl.rl import events


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    number: int
    run: PlannedRun | None = None
    heard_at: float = 0.0  # when it last sent something, by the monotonic clock


@dataclass(frozen=True)
class LocalPool:
    """A pool of `workers` processes of `threads` threads each. They end with this process, however it ends.

    `report_to`: see `lab.work.execute_run`. Accelerators are dealt out to the workers (`devices.py`).

    If a worker dies (killed, out of memory), only its own run fails, which is reported and can be run again; a new
    worker replaces it. So does one that reports no progress for `stall_s` seconds (None: never): its worker is killed.
    """

    workers: int = 2
    threads: int = 1
    report_to: tuple[str, ...] = ()
    stall_s: float | None = None

    def __call__(self, runs: Sequence[PlannedRun], root: Path, on_event: OnEvent) -> Generator[Outcome, None, None]:
        """Yield outcomes as they come. After Ctrl-C every run keeps a checkpoint, and KeyboardInterrupt is raised; on
        any exception here (a second Ctrl-C) all workers are ended before it is passed on."""
        agenda, stopping = Agenda(runs), False
        workers: list[_Worker] = []
        dealt = self._dealt(runs)
        idle: list[_Worker | int] = [*range(len(dealt))]  # the number of one that is still to be started
        with interruptible() as interrupted, contextlib.ExitStack() as at_last:
            at_last.callback(_kill, workers)
            at_last.callback(lambda: _kill([each for each in idle if isinstance(each, _Worker)]))
            while True:
                if interrupted.is_set() and not stopping:
                    stopping = True
                    agenda.clear()
                    on_event(Event("", STOPPING, 0, 0))
                    _ask_to_end(workers)
                while idle and (run := agenda.take()) is not None:  # those that run already are ended on an error
                    workers.append(self._assigned(run, root, self._ready(idle.pop(0), dealt)))
                if not agenda:
                    _stop_all(idle)
                if not workers:
                    break
                ready = wait([w.pipe for w in workers], timeout=1.0)
                for worker in [w for w in workers if w.pipe in ready or self._stalled(w)]:
                    outcome = _received(worker, root, on_event) if worker.pipe in ready else _ended(worker, root)
                    if outcome is None:
                        continue
                    yield outcome
                    yield from agenda.ended(outcome)
                    workers.remove(worker)
                    idle.append(worker)
            if interrupted.is_set():
                raise KeyboardInterrupt

    def _dealt(self, runs: Sequence[PlannedRun]) -> list[dict[str, str]]:
        """Return the environment of each worker: fewer than asked for where a run's processes take more devices each
        than so many workers would have."""
        count = min(self.workers, len(runs))
        devices = devices_here() if count > 1 else None
        if devices is None:
            return [{}] * count
        together = max(run.experiment.processes for run in runs)
        count = max(1, min(count, len(devices.names) // together)) if together > 1 else count
        return [devices.of_worker(number, count) for number in range(count)]

    def _ready(self, worker: _Worker | int, dealt: Sequence[dict[str, str]]) -> _Worker:
        """Return an idle worker that lives: one that is started, in place of one that died."""
        if isinstance(worker, _Worker):
            if worker.process.is_alive():
                return worker
            _close(worker)
        number = worker.number if isinstance(worker, _Worker) else worker
        return self._spawned(number, dealt[number])

    def _assigned(self, run: PlannedRun, root: Path, worker: _Worker) -> _Worker:
        worker.run, worker.heard_at = run, time.monotonic()
        worker.pipe.send((run, root, self.report_to))
        return worker

    def _stalled(self, worker: _Worker) -> bool:
        return self.stall_s is not None and time.monotonic() - worker.heard_at > self.stall_s

    def _spawned(self, number: int, environment: dict[str, str]) -> _Worker:
        process, ours = spawned(_serve, self.threads, environment)
        return _Worker(process, ours, number)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Set the yielded event at the first Ctrl-C; the second is raised as KeyboardInterrupt."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def remember(*_: Any) -> None:
        if interrupted.is_set():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one would interrupt the ending of the workers
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _received(worker: _Worker, root: Path, on_event: OnEvent) -> Outcome | None:
    assert worker.run is not None
    worker.heard_at = time.monotonic()
    try:
        message: Event | Outcome = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        folder = run_folder(root, worker.run.suite, worker.run.run_id)
        why = died(worker.process.exitcode, folder)
        heartbeat.note_end(folder.path, "lost", why)
        return Outcome(worker.run, why)
    if isinstance(message, Outcome):
        return message
    on_event(message)
    return None


def _ended(worker: _Worker, root: Path) -> Outcome:
    """End a worker that has not moved for too long; its run failed, and the reason names where it stood."""
    worker.process.kill()
    worker.process.join()
    assert worker.run is not None
    return stalled(worker.run, root, time.monotonic() - worker.heard_at)


def stalled(run: PlannedRun, root: Path, silent_s: float) -> Outcome:
    """Return the outcome of a run that was ended after `silent_s` seconds without progress, and note it there."""
    folder = run_folder(root, run.suite, run.run_id).path
    beat = heartbeat.read(folder)
    where, then = beat.where if beat is not None else "its start", f"the same command {what_follows(folder)}"
    why = f"it stalled at {where}: no progress for {silent_s / 60:.3g} minutes, so it was ended; {then}"
    heartbeat.note_end(folder, "failed", why)
    return Outcome(run, why)


def died(code: int | None, folder: RunFolder) -> str:
    """Describe a process that ended without a message: its signal, and its stacks if it left any."""
    log, stacks = folder.path / "log.txt", False
    if code is not None and code < 0 and -code != signal.SIGKILL and log.is_file():  # stacks: none of one killed
        stacks = FATAL in log.read_text(encoding="utf-8", errors="replace")
    where = f"; its stacks are in {log}" if stacks else ""
    return f"its process died ({described(code)}){where}; the same command {what_follows(folder.path)}"


def _ask_to_end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        if worker.process.pid is not None and worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGINT)


def _kill(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        _close(worker)


def _stop_all(idle: list[_Worker | int]) -> None:
    """End the workers that nothing is left for."""
    for worker in idle:
        if isinstance(worker, _Worker):
            with contextlib.suppress(BrokenPipeError):
                worker.pipe.send(None)
            _close(worker)
    idle.clear()


def _close(worker: _Worker) -> None:
    """Wait for a process and free what it holds here, now: a Ctrl-C that met that in a finalizer prints a traceback."""
    worker.process.join()
    worker.process.close()


def _serve(pipe: Connection, parent: int, threads: int, environment: dict[str, str]) -> None:
    """Run, in the child, what is sent until told to stop; send back each run's events and outcome.

    `environment` names the devices of this worker, before torch looks for them.
    """
    os.environ.update(environment)
    stop_requested = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop_requested.set())  # from the terminal, or passed on by the parent
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # OpenMP reads it when torch is loaded
    while (order := pipe.recv()) is not None:
        run, root, report_to = order
        if run.experiment.processes > 1:
            pipe.send(together(run, root, report_to, pipe.send, stop_requested.is_set))
            continue
        ready(threads)
        pipe.send(attempt(run, root, report_to, pipe.send, stop_requested.is_set))


@cache
def ready(threads: int) -> None:
    """Import torch for the runs of this process; those that are trained together import it in theirs."""
    from fp4rl.models.quiet import quiet

    quiet()  # before torch and its threads: it writes to the environment
    import torch

    torch.set_num_threads(threads)


def attempt(
    run: PlannedRun,
    root: Path,
    report_to: tuple[str, ...],
    on_event: OnEvent,
    interrupted: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run in this process; an error becomes the outcome, and its traceback is kept in the run's log."""
    from fp4rl.lab.work import execute_run
    from fp4rl.spec.errors import CheckFailed, UserError

    def emit(event: events.Event) -> None:
        if (shown := Event.of(run, event)) is not None:
            on_event(shown)

    try:
        choose_backend(lambda message: emit(events.Progress(message, 0, 0)))
        add_samplers()
        execute_run(run, root, emit, report_to, interrupted)
    except (events.Interrupted, UserError, CheckFailed) as error:
        mistake, asked_to_end = isinstance(error, UserError), isinstance(error, events.Interrupted)
        return Outcome(run, str(error), mistake=mistake, interrupted=asked_to_end)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        where = _keep_traceback(run, root, error)
        what = str(error).splitlines()[0] if str(error) else "no message"
        return Outcome(run, f"{type(error).__name__}: {what} ({where})")
    return Outcome(run)


def _keep_traceback(run: PlannedRun, root: Path, error: BaseException) -> str:
    """Write the traceback to the run's log; return where it is, or why it could not be written."""
    log = run_folder(root, run.suite, run.run_id).path / "log.txt"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)  # a run that failed before it began has no folder
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as why:
        return f"its traceback could not be kept: {why.strerror}"
    return "traceback in its log.txt"
