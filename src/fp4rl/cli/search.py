"""`fp4rl search`: find a recipe in a space within a budget, and judge it by seeds and problems that did not choose."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from filelock import FileLock, Timeout

from fp4rl.cli.executor import STALL_MINUTES, StallTimeout
from fp4rl.cli.options import Address, AsJson, Jobs, RunsRoot
from fp4rl.cli.plan import earlier_runs
from fp4rl.cli.run import carry_out_all
from fp4rl.cli.terminal import console, print_json
from fp4rl.lab.catalogue import space_file
from fp4rl.lab.estimates import time_of
from fp4rl.lab.files import unwritable_named
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runner import SuiteOutcome, require_trl
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Suite
from fp4rl.spec.space import Space, load_space

if TYPE_CHECKING:
    from fp4rl.lab.search.conduct import Search, Stopwatch
    from fp4rl.lab.search.result import Result

_UNITS = {"s": 1, "m": 60, "h": 3600}
_SHORT_S = 90
_BUDGET = re.compile(r"(\d+(?:\.\d+)?[smh])+")


def seconds_of(budget: str) -> float:
    """Return the seconds of `60m`, `1h30m` or `90s`; raises InvalidValueError for anything else, and for none."""
    if not _BUDGET.fullmatch(budget):
        raise InvalidValueError(f"--budget {budget}: write a time such as 60m, 1h30m or 90s")
    seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smh])", budget))
    if not seconds:
        raise InvalidValueError(f"--budget {budget}: is no time at all")
    return seconds


def command(
    space: Annotated[Path, typer.Argument(help="YAML file of a space, or one that ships: spaces/w4a4.yaml.")],
    budget: Annotated[str, typer.Option(help="Wall clock of the whole search, such as 60m or 1h30m.")] = "60m",
    runs: RunsRoot = Path("runs"),
    jobs: Jobs = 2,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where the budget does not hold the final over all seeds.")
    ] = False,
    ledger: Address = None,
    stall_timeout: StallTimeout = STALL_MINUTES,
    as_json: AsJson = False,
) -> None:
    """Find a recipe in a space, and judge it against an unquantized control of equal budget.

    Candidates are screened on validation problems; the chosen one is judged on the test split, by fresh seeds and the
    margin that the file names. The same command goes on after a kill.

    Example: `fp4rl search spaces/w4a4.yaml --budget 60m --jobs 2`
    """
    from fp4rl.lab.search.final import own_control
    from fp4rl.lab.search.leakage import require_separate
    from fp4rl.lab.search.proposals import require_optuna

    allowed_s, described = seconds_of(budget), load_space(space_file(space))
    require_separate(described)
    if described.control is not None:
        own_control(described, described.control)  # refused now, not when the final begins
    require_optuna()
    require_trl()
    options = {"quiet": True, "stall_minutes": stall_timeout}
    run = partial(carry_out_all, root=runs, jobs=jobs, ledger=ledger, **options)  # type: ignore[arg-type]
    with _alone(runs / described.search):
        result = _searched(described, _Budget(allowed_s, jobs, force), runs, run, ledger, quiet=as_json)
    if as_json:
        print_json(result.as_dict())
        return
    for line in result.lines():
        console().print(line, soft_wrap=True)


@dataclass(frozen=True)
class _Budget:
    """What a search may take: seconds, runs at a time, and whether it goes on where that is too little."""

    seconds: float
    jobs: int
    force: bool


def _searched(
    space: Space, budget: _Budget, runs: Path, run: Callable[..., SuiteOutcome], ledger: str | None, *, quiet: bool
) -> "Result":
    """Carry a search out as far as the budget goes, and write what it came to, also where it is interrupted."""
    from fp4rl.lab.search.candidates import Recipes
    from fp4rl.lab.search.conduct import OutOfTime, Search, Stopwatch
    from fp4rl.lab.search.earlier import earlier
    from fp4rl.lab.search.proposals import keep_study
    from fp4rl.lab.search.records import FILE, Book, Earlier, Planned, Spent
    from fp4rl.lab.search.runs import Runs
    from fp4rl.lab.search.written import write_result

    folder, screen = runs / space.search, console(stderr=True)
    book = Book.read(folder / FILE)
    watch, recipes = Stopwatch(book.used_s), Recipes(space)

    def tell(line: str) -> None:
        if not quiet:
            screen.print(f"{line} ({_left(budget.seconds - watch.used_s)})", soft_wrap=True)
        keep_study(space, book, folder / "search.db")

    def run_suite(suite: Suite, arms: Sequence[str], seeds: Sequence[int]) -> SuiteOutcome:
        with _until(budget.seconds, watch):
            return run(suite, suite.suite, arms=arms, seeds=seeds)

    bench = Runs(recipes, book, runs, run_suite)
    search = Search(recipes, book, bench, budget.seconds, budget.jobs, budget.force, tell, watch)
    search.begin()
    if book.last(Earlier) is None and (looked := earlier(runs, space)):
        book.add(Earlier(searches=looked))
    if book.last(Planned) is None:
        _require_enough(search, bench.planned(search.first()), runs, ledger)
    try:
        search.run()
    except OutOfTime:
        raise CheckFailed(
            "the budget was used up before the final, so that there is no verdict; a larger --budget goes on"
        ) from None
    finally:
        book.add(Spent(used_s=watch.used_s))
        keep_study(space, book, folder / "search.db")
        result = write_result(recipes, book, folder)
    return result


def _left(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left" if seconds > _SHORT_S else f"{max(seconds, 0):.0f} s left"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a search; raises InvalidValueError where another process holds it, or none can be made."""
    with unwritable_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InvalidValueError(
                f"{folder}: another process carries this search out; wait for it, or end it"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _until(allowed_s: float, watch: "Stopwatch") -> Iterator[None]:
    """End what runs inside as Ctrl-C does when the budget is used up, at a checkpoint of each run; OutOfTime then."""
    from fp4rl.lab.search.conduct import OutOfTime

    ended, over = threading.Event(), threading.Event()

    def end() -> None:
        if not ended.is_set():
            over.set()
            os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(max(allowed_s - watch.used_s, 1.0), end)
    timer.daemon = True
    timer.start()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except KeyboardInterrupt:
        if not over.is_set():
            raise
        signal.signal(signal.SIGINT, before)
        raise OutOfTime from None
    finally:
        ended.set()
        timer.cancel()


def _require_enough(search: "Search", first: Sequence[PlannedRun], runs: Path, ledger: str | None) -> None:
    """Refuse a budget at the start that is too short by what earlier runs like these took; say where none tell."""
    known = earlier_runs(first, runs, ledger)
    times = {run.arm: time_of(run, known) for run in first}
    took = {arm: own[0] for arm, own in times.items() if own is not None}
    if len(took) < len(times):
        search.tell("no earlier run tells how long these take: the first candidates will")
    else:
        search.expected(took)
