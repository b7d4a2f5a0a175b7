"""`python -m fp4rl.engines.executors.rank FOLDER`: one of the processes that train a run together."""

import os
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from fp4rl.engines.environment import leave, rank_of_launcher
from fp4rl.engines.executors.deaths import die_with
from fp4rl.engines.executors.processes import attempt
from fp4rl.engines.executors.together import SOCKET, Ended


def take_part(folder: Path) -> int:
    """Take part in the run that the worker at the other end of the socket in `folder` names; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=die_with, args=(os.getppid(),), daemon=True).start()
    rank, line = rank_of_launcher(), socket.socket(socket.AF_UNIX)
    line.connect(str(folder / SOCKET))
    pipe = Connection(line.detach())
    pipe.send(rank)
    run, root, report_to = pipe.recv()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(pipe, stop), daemon=True).start()
    from fp4rl.models.quiet import quiet

    quiet()
    outcome = attempt(run, root, report_to, pipe.send if rank == 0 else lambda _: None, stop.is_set)
    pipe.send(Ended(rank, time.monotonic(), outcome))
    return int(outcome.error is not None)


def _listen(pipe: Connection, stop: threading.Event) -> None:
    """Take the worker's wish to stop; end this process at once when the worker is gone."""
    try:
        pipe.recv()
        stop.set()
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    leave(take_part(Path(sys.argv[1])))
