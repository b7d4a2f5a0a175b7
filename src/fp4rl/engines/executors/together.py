"""One run trained by several processes of this machine, which its worker starts, listens to and ends.

They are the children of torch's own launcher, which ends all of them when one fails; it ends with the worker, and they
with it. Each is connected with the worker by a socket: the first sends events, and each its outcome.
"""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from fp4rl.engines.executors.deaths import described
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.resuming import what_follows
from fp4rl.lab.runner import Event, OnEvent, Outcome

SOCKET = "socket"
STOP = "stop"
_LAUNCHER = "fp4rl.engines.executors.launcher"
_TAIL = 20  # lines of a dead process's log that are kept


class Ended(NamedTuple):
    """How one process ended: its number, when (of the machine's monotonic clock), and its outcome."""

    rank: int
    at: float
    outcome: Outcome


@dataclass
class _Heard:
    """What the processes of one run have sent so far."""

    pipes: dict[Connection, int] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)

    def take(self, pipe: Connection, on_event: OnEvent) -> None:
        try:
            message: Event | Ended = pipe.recv()
        except (EOFError, OSError):  # it may have been killed in mid-message
            del self.pipes[pipe]
            return
        if isinstance(message, Ended):
            self.ended.append(message)
        else:
            on_event(message)


def together(
    run: PlannedRun, root: Path, report_to: tuple[str, ...], on_event: OnEvent, interrupted: Callable[[], bool]
) -> Outcome:
    """Run with as many processes as its experiment asks for; the outcome is that of the first to fail."""
    with TemporaryDirectory(prefix="fp4rl-") as scratch, socket.socket(socket.AF_UNIX) as listener:
        folder, count = Path(scratch), run.experiment.processes
        listener.bind(str(folder / SOCKET))
        listener.listen(count)
        with (folder / "launcher.log").open("wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", _LAUNCHER, str(count), scratch],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C goes to the worker, which asks for a checkpoint first
            )
        try:
            heard = _listened(listener, launcher, (run, root, report_to), on_event, interrupted)
            codes = {int(rank): int(code) for rank, code in json.loads(launcher.communicate()[0] or b"{}").items()}
        finally:
            launcher.kill()
            launcher.wait()
        return _judged(run, root, heard.ended, codes, folder)


def _listened(
    listener: socket.socket, launcher: Any, order: object, on_event: OnEvent, interrupted: Callable[[], bool]
) -> _Heard:
    """Give the order to each process that connects, and take what they send until the launcher has ended."""
    heard, requested = _Heard(), False
    while True:
        ready = wait([launcher.stdout, listener, *heard.pipes], timeout=1.0)
        for source in ready:
            if source is listener:
                pipe = Connection(listener.accept()[0].detach())
                heard.pipes[pipe] = pipe.recv()
                pipe.send(order)
            elif isinstance(source, Connection):
                heard.take(source, on_event)
        if interrupted() and not requested and 0 in heard.pipes.values():
            requested = True
            next(pipe for pipe, rank in heard.pipes.items() if rank == 0).send(STOP)
        if ready == [launcher.stdout]:  # it writes when all have ended, and nothing of theirs is left
            return heard


def _judged(run: PlannedRun, root: Path, ended: list[Ended], codes: dict[int, int], folder: Path) -> Outcome:
    """Return the outcome of all: a process that was killed comes before those that failed for its sake."""
    killed = [rank for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM]
    failed = sorted((each for each in ended if each.outcome.error is not None), key=lambda each: each.at)
    if failed and not killed:
        first, outcome = failed[0].rank, failed[0].outcome
        if first == 0 or outcome.mistake or outcome.interrupted:  # these are of all processes
            return outcome
        return Outcome(run, f"process {first} of {run.experiment.processes}: {outcome.error}")
    if not codes and len(ended) == run.experiment.processes:
        return Outcome(run)
    rank = next(iter([*killed, *codes]), None)
    logs = [folder / "launcher.log"] if rank is None else folder.glob(f"logs/*/attempt_0/{rank}/stderr.log")
    tail = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]]
    _keep(root, run, tail)
    who = "the launcher of its processes" if rank is None else f"process {rank} of {run.experiment.processes}"
    how = "" if rank is None else f" ({described(codes[rank])})"
    last = f"; the last line of its log: {tail[-1].strip()}" if tail else "; it had written nothing to its log"
    then = f"the same command {what_follows(run_folder(root, run.suite, run.run_id).path)}"
    return Outcome(run, f"{who} died{how}{last}; {then}")


def _keep(root: Path, run: PlannedRun, tail: list[str]) -> None:
    log = run_folder(root, run.suite, run.run_id).path / "log.txt"
    if tail and log.parent.is_dir():
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in tail)
