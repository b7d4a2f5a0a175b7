"""Commands of fp4rl, each in a process of its own, start included; and the answers of a made-up run."""

import resource
import subprocess
import sys
import time
from typing import NamedTuple

ENTRY = "from fp4rl.cli.main import entry; entry()"  # what the console script does


class Took(NamedTuple):
    """Seconds by the clock, and of the CPU: a busy machine says nearly the same of these as an idle one."""

    wall: float
    cpu: float


def took(*arguments: str) -> Took:
    """Return what one command line takes."""
    began, clock = _of_children(), time.perf_counter()
    subprocess.run([sys.executable, "-c", ENTRY, *arguments], check=True, stdout=subprocess.DEVNULL)
    return Took(time.perf_counter() - clock, _of_children() - began)


def tries(*arguments: str) -> list[Took]:
    """Return what three tries of a command line take."""
    return [took(*arguments) for _ in range(3)]


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def item(index: int, solved: bool) -> dict[str, object]:
    """Return one row of an items file: the answer to problem `index`."""
    answer = f"{index} + {index} = {2 * index} #### {2 * index if solved else index}"
    flags = {"strict": solved, "flexible": solved, "formatted": True, "truncated": False}
    return {"problem_id": f"test-{index:05d}", "sample": 0, "completion": answer, "length": 17} | flags


def written(number: int, count: int) -> None:
    """Say now and then how many runs are written."""
    if number % 50 == 0 or number == count:
        end = "\n" if number == count else ""
        print(f"\r{number} of {count} runs written", end=end, file=sys.stderr, flush=True)
