"""A part of a preflight in a process of its own: the warm-up of start models, then the fake steps of every other arm.

What that process does not come to, because it died or met an error, is done here in the same way.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory

from fp4rl.engines.environment import choose_backend
from fp4rl.engines.executors.deaths import die_with
from fp4rl.engines.executors.spawned import spawned
from fp4rl.lab.preflight.rows import Subject

OnWarmUp = Callable[[int, int], None]
"""Called with (step, steps) of a warm-up."""

_MESSAGES = 100  # of one warm-up: few enough for a pipe that nobody reads yet


@contextlib.contextmanager
def beside(subject: Subject) -> Iterator[Callable[[OnWarmUp], object]]:
    """Begin that part; yield a function that waits for the start models, after which weights can be looked at."""
    # Its scratch folder is removed here, so that it can be killed at any time: it would take seconds to end by itself.
    with TemporaryDirectory(prefix="fp4rl-") as scratch, contextlib.ExitStack() as at_last:
        process, pipe = spawned(_part, subject, scratch)
        at_last.callback(_end, process, pipe)
        yield lambda on_warm_up: at_last.enter_context(_begun(subject, pipe, on_warm_up))


def _end(process: SpawnProcess, pipe: Connection) -> None:
    process.kill()
    process.join()
    process.close()
    pipe.close()


@contextlib.contextmanager
def _begun(subject: Subject, pipe: Connection, on_warm_up: OnWarmUp) -> Iterator[None]:
    """Wait for the start models, and share this machine with the other process inside the `with`."""
    if find_spec("trl") is not None:
        import_module("fp4rl.rl.session")  # which takes seconds
    from fp4rl.lab.preflight.lighter import half_of_the_threads
    from fp4rl.lab.preflight.steps import Tried, tried, tried_of

    with contextlib.suppress(EOFError, OSError):
        while (told := pipe.recv()) is not None:
            on_warm_up(*told)

    def both() -> dict[str, Tried]:
        made = tried_of(subject, _ours(subject))
        try:
            made |= pipe.recv()
        except (EOFError, OSError):
            made |= tried_of(subject, _theirs(subject))
        return {arm: made[arm] for arm in subject.arms}

    tried.made_by(subject, both)
    with half_of_the_threads():
        yield


def _ours(subject: Subject) -> tuple[str, ...]:
    return tuple(subject.arms)[::2]


def _theirs(subject: Subject) -> tuple[str, ...]:
    return tuple(subject.arms)[1::2]


def _part(pipe: Connection, parent: int, subject: Subject, scratch: str) -> None:
    """Make each start model, send how far its warm-up is and None after the last, then what the fake steps recorded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # `quiet` does without, for processes that have to share the cores
    with contextlib.suppress(Exception):  # the parent meets it too, and says it
        _do(subject, pipe, scratch)


def _do(subject: Subject, pipe: Connection, scratch: str) -> None:
    from fp4rl.models.quiet import quiet

    quiet()
    choose_backend(lambda _: None)
    from fp4rl.lab.preflight.lighter import half_of_the_threads, imports_kept
    from fp4rl.lab.preflight.live import warmed_up
    from fp4rl.lab.preflight.steps import tried_of

    warmed_up(subject, lambda step, steps: _told(pipe, step, steps))
    pipe.send(None)
    with imports_kept(), half_of_the_threads():
        pipe.send(tried_of(subject, _theirs(subject), scratch))


def _told(pipe: Connection, step: int, steps: int) -> None:
    if step % max(1, steps // _MESSAGES) == 0:
        pipe.send((step, steps))
