"""`fp4rl run`: run everything in a file that is not finished, then show the comparison."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fp4rl.cli.described import described_by, own_code, require_here, runs_described, selected, warnings_of
from fp4rl.cli.display import Display
from fp4rl.cli.executor import STALL_MINUTES, ClusterAddress, StallTimeout, Where, executor_of
from fp4rl.cli.ledger import ledger_address
from fp4rl.cli.options import Address, AsJson, AtScale, Jobs, Overrides, ReportTo, RunsRoot, SpecFile
from fp4rl.cli.preflight import checked_first
from fp4rl.cli.profile_view import profiled
from fp4rl.cli.run_end import import_the_end
from fp4rl.cli.terminal import console, leave_out, print_json, say_once
from fp4rl.engines.environment import launched
from fp4rl.engines.executors.torchrun import follow
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.preflight.rows import Subject
from fp4rl.lab.provenance import changed_inputs
from fp4rl.lab.runner import (
    Outcome,
    SuiteOutcome,
    archive_stale,
    keep_suite,
    require_trl,
    run_all,
    split_finished,
    stale,
)
from fp4rl.lab.stages import require_sources
from fp4rl.models.quiet import quiet as quiet_libraries
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.words import agreeing, counted


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    scale: AtScale = None,
    runs: RunsRoot = Path("runs"),
    jobs: Jobs = 2,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; may be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; may be repeated.")] = None,
    report_to: ReportTo = None,
    ledger: Address = None,
    rerun_stale: Annotated[
        bool,
        typer.Option(
            "--rerun-stale", help="Also repeat finished runs that were made with other code or from other files."
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step goes; every run has it as profile.md.")
    ] = False,
    stall_timeout: StallTimeout = STALL_MINUTES,
    executor: Where = "local",
    address: ClusterAddress = None,
    skip_preflight: Annotated[
        bool, typer.Option("--skip-preflight", help="Begin without `fp4rl preflight` (all from 300 steps), and say so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a suite or an experiment. Finished runs are skipped; the same command resumes interrupted ones.

    Examples: `fp4rl run catalogue/quickstart seeds=[0,1] --jobs 2`, `fp4rl run suite.yaml --executor ray --jobs 16`
    """
    described = described_by(spec, overrides or [], scale)
    outcome = carry_out_all(
        described,
        spec.stem,
        runs,
        jobs,
        report_to or (),
        ledger,
        rerun_stale=rerun_stale,
        arms=arm or (),
        seeds=seed or (),
        quiet=as_json,
        stall_minutes=stall_timeout,
        where=executor,
        address=address,
        skip_preflight=skip_preflight,
    )
    done = [*outcome.skipped, *outcome.done]
    if not done and not outcome.failed:
        return  # of several processes only the first prints
    times = profiled(done, runs, console().width) if profile and done else None
    if as_json:
        ids = {"skipped": [run.run_id for run in outcome.skipped], "done": [run.run_id for run in outcome.done]}
        print_json(ids | {"failed": {ended.run.run_id: ended.error for ended in outcome.failed}})
    elif done:
        _show(described, runs, done, ledger)
        if times is not None:
            console().print(times)
    end(outcome)


def _show(described: Suite | Experiment, root: Path, done: Sequence[PlannedRun], ledger: str | None) -> None:
    """Show a suite's table and write its page, or show a single run's accuracies and where its files are."""
    from fp4rl.cli.report import show
    from fp4rl.cli.show import accuracies

    if isinstance(described, Suite):
        show(root / described.suite, ledger=ledger)
        return
    for run in done:
        folder = run_folder(root, run.suite, run.run_id)
        evaluations = folder.result().evaluations
        console().print(accuracies([each for each in evaluations if each.last or each.step == 0]))
        console().print(f"{folder.path}: `fp4rl show {folder.key}` shows all of it", soft_wrap=True)


def end(outcome: SuiteOutcome) -> None:
    """Exit with 2 if a run could not start because of its spec, with 1 if one failed later."""
    messages = sorted({str(ended.error) for ended in outcome.failed if ended.mistake})
    if messages:
        more = f" (and {counted(len(messages) - 1, 'other mistake')})" if len(messages) > 1 else ""
        raise InvalidValueError(f"{messages[0]}{more}")
    if outcome.failed:
        failed, them = len(outcome.failed), agreeing(len(outcome.failed), "it", "them")
        raise CheckFailed(f"{failed} of the runs failed; the same command tries {them} again")


def carry_out_all(
    described: Suite | Experiment,
    name: str,
    root: Path,
    jobs: int,
    report_to: Sequence[str] = (),
    ledger: str | None = None,
    *,
    rerun_stale: bool = False,
    quiet: bool = False,
    stall_minutes: float = STALL_MINUTES,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    where: Where = "local",
    address: str | None = None,
    skip_preflight: bool = False,
) -> SuiteOutcome:
    """Run what is described below `root` with a live display, of named `arms` and `seeds` only these.

    Under a launcher (torchrun) all its processes train each run together, and only the first prints.
    """
    from fp4rl.lab.sinks import close_left_open, require_sinks

    require_sinks(report_to)
    executor = executor_of(where, address, jobs, report_to, stall_minutes)
    every = selected(runs_described(described, name), arms, seeds)
    require_here(every)
    runs = _trained_here(every, root)
    if launched():
        quiet_libraries()
        from fp4rl.rl import processes

        if not processes.is_first():
            follow(root)
            return SuiteOutcome()
    keep_suite(root, every[0].suite, described.model_dump(mode="json"))
    if rerun_stale:
        archive_stale(stale(runs, root), root)
    finished, missing = split_finished(runs, root)
    refuse_others(finished, root)
    screen, book = console(stderr=True), ledger_address(root, ledger)
    missing = checked_first(Subject(described, tuple(missing), root, tuple(report_to)), screen, skip=skip_preflight)
    runs = [*finished, *missing]
    if launched():
        processes.from_first(missing)
    if "mlflow" in report_to and missing:
        close_left_open(root / runs[0].suite)
    if not quiet:
        _say_finished(runs, missing, screen)
    _say_beforehand(missing, described, screen, quiet=quiet)
    _record(book, root, screen)  # also runs that a killed process finished but did not record
    display = Display(missing, screen)
    import_the_end()

    def ended(outcome: Outcome) -> None:
        display.on_outcome(outcome)
        _record(book, root, screen, under_way=True)

    with display.shown(), _last_interrupt():
        return run_all(runs, root, executor, display.on_event, ended)


def _say_finished(runs: Sequence[PlannedRun], missing: Sequence[PlannedRun], screen: Console) -> None:
    """Say how many runs are finished."""
    finished = len(runs) - len(missing)
    if finished:
        screen.print(f"{finished} of {counted(len(runs), 'run')} {agreeing(finished, 'is', 'are')} finished already")


def _say_beforehand(
    missing: Sequence[PlannedRun], described: Suite | Experiment, screen: Console, *, quiet: bool
) -> None:
    """Say what code of the user's own is loaded and, unless `quiet`, what is hardly ever meant."""
    for line in own_code(missing):
        screen.print(f"code: {line}", soft_wrap=True)
    for line in warnings_of(missing, described) if missing and not quiet else ():
        screen.print(f"warning: {line}")


@contextmanager
def _last_interrupt() -> Iterator[None]:
    """Ignore Ctrl-C behind the one that ends the runs: one more would print tracebacks on the way out."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


def _trained_here(runs: Sequence[PlannedRun], root: Path) -> list[PlannedRun]:
    """Return the runs without those that another engine has yet to train, which are named; the others need TRL."""
    missing = split_finished(runs, root)[1]
    elsewhere = [run for run in missing if run.experiment.engine != "trl"]
    for engine in dict.fromkeys(run.experiment.engine for run in elsewhere):
        own = ", ".join(run.run_id for run in elsewhere if run.experiment.engine == engine)
        how = "`fp4rl verl-config` writes its scripts, `fp4rl runs import` takes each in when it is finished"
        say_once([f"{own}: to be trained by {engine}; {how}"])
    require_sources([run for run in missing if run not in elsewhere], root)
    if len(missing) > len(elsewhere):
        require_trl()
    return [run for run in runs if run not in elsewhere]


def _record(book: str | Path, root: Path, screen: Console, *, under_way: bool = False) -> None:
    """Record finished runs. Old runs that cannot be read, and a ledger that cannot be used now (locked, a full disk),
    do not stop new runs: the next process that opens the ledger records what is missing."""
    from fp4rl.lab.ledger.record import record_new
    from fp4rl.lab.ledger.store import Locked, Unusable, open_ledger

    try:
        with open_ledger(book) as ledger:
            record_new(ledger, root, on_damaged=leave_out)
    except Unusable as error:
        if not under_way and not isinstance(error, Locked) and "://" in str(book):  # an address that is wrong
            raise
        screen.print(f"warning: {error}", soft_wrap=True)


def refuse_others(finished: Sequence[PlannedRun], root: Path) -> None:
    """Raise InvalidValueError where a finished run was made from other files than the present ones."""
    changed = changed_inputs(finished, root)
    if changed:
        run, names = next(iter(changed.items()))
        more = f" (and {counted(len(changed) - 1, 'other run')})" if len(changed) > 1 else ""
        raise InvalidValueError(
            f"{run} is finished, but was made from another {' and '.join(names)} than there is now{more}; "
            "--rerun-stale repeats it, --runs names a place for new ones"
        )
