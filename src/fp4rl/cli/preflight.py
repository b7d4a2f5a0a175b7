"""`fp4rl preflight`: every check that acts before a run, a row each, in seconds."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from textwrap import shorten, wrap
from typing import Annotated, Any

import typer
from rich.console import Console

from fp4rl.cli.described import described_by, runs_described, selected
from fp4rl.cli.options import AsJson, AtScale, Overrides, ReportTo, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, styled
from fp4rl.engines.environment import cores, forget_launcher, launched
from fp4rl.engines.executors.beside import beside
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.preflight.preflight import EVERY, at_stake, keep_passed, passed_before, preflight
from fp4rl.lab.preflight.rows import Needs, Row, Subject
from fp4rl.lab.preflight.traps import traps
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.words import counted

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "waits": "cyan"}
_NAME, _LINES = 12, 2  # columns of a check's name, and lines of a row


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    scale: AtScale = None,
    runs: RunsRoot = Path("runs"),
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; may be repeated.")] = None,
    report_to: ReportTo = None,
    static: Annotated[
        bool, typer.Option("--static", help="Only what needs no model: settings, questions, deployment, this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a suite or an experiment for every known trap before hours are spent; exit code 1 where one is met.

    Each check is a row: its verdict, the measured value, the expected one and the cure. `waits` needs weights that are
    not here. Example: `fp4rl preflight catalogue/quickstart --static`
    """
    described = described_by(spec, overrides or [], scale)
    planned = selected(runs_described(described, spec.stem), arm or (), ())
    rows = looked_at(Subject(described, planned, runs, tuple(report_to or ())), ("nothing",) if static else EVERY)
    if as_json:
        print_json(as_dict(rows, planned[0].suite))
    else:
        show(rows)
    require_passed(rows)


def looked_at(subject: Subject, levels: tuple[Needs, ...]) -> list[Row]:
    """Return the rows of some levels, with progress on stderr."""
    apart = "weights" in levels and len(subject.arms) > 1 and cores() > 1
    with progress() as advance, ExitStack() as at_last:
        warm_up = at_last.enter_context(beside(subject)) if apart else partial(_warmed_up, subject)

        def before_weights() -> None:
            from fp4rl.lab.preflight.lighter import imports_kept

            warm_up(partial(advance, "warm-up"))
            at_last.enter_context(imports_kept())

        if "model" in levels:
            quiet()
            ready_to_round()
        return [*preflight(subject, levels, partial(advance, "preflight"), before_weights)]


def _warmed_up(subject: Subject, on_warm_up: Callable[[int, int], None]) -> None:
    from fp4rl.lab.preflight.live import warmed_up

    warmed_up(subject, on_warm_up)


def _looked_at_apart(subject: Subject, levels: tuple[Needs, ...]) -> list[Row]:
    """Return the rows of some levels as a process of its own sees them: under a launcher this one is part of a group,
    and the fake steps would wait for the others."""
    with ProcessPoolExecutor(1, get_context("spawn"), forget_launcher) as pool:
        return pool.submit(looked_at, subject, levels).result()


def checked_first(subject: Subject, screen: Console, *, skip: bool) -> list[PlannedRun]:
    """Look for known traps before runs begin, or `skip` that and return runs that say so.

    What is free is looked at each time, the rest once, where enough is at stake. Raises CheckFailed, with what was
    measured and the cure, where a check fails.
    """
    if skip or not subject.runs:
        return [replace(run, unchecked=skip) for run in subject.runs]
    levels = at_stake(subject.runs)
    known = "model" in levels and passed_before(subject)
    look = _looked_at_apart if launched() and "model" in levels and not known else looked_at
    rows = look(subject, ("nothing",) if known else levels)
    for row in (row for row in rows if row.verdict == "fail"):
        what = "; ".join(filter(None, (row.measured, row.cure)))
        raise CheckFailed(f"preflight, {row.check}: {what}; --skip-preflight runs it all the same, and says so")
    if "model" in levels and not known:
        counts = Counter[str](row.verdict for row in rows)
        said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS if counts[verdict])
        screen.print(f"preflight: {said} (`fp4rl preflight` shows them)")
        keep_passed(subject, rows)
    return [*subject.runs]


def as_dict(rows: Sequence[Row], suite: str) -> dict[str, Any]:
    """Return the rows as plain values: `suite`, the `counts` of verdicts, and `rows` with all their words."""
    return {"suite": suite, "counts": Counter(row.verdict for row in rows), "rows": [row.as_dict() for row in rows]}


def require_passed(rows: Sequence[Row]) -> None:
    """Raise CheckFailed, naming the checks, where a row fails."""
    failed = list(dict.fromkeys(row.check for row in rows if row.verdict == "fail"))
    if failed:
        raise CheckFailed(f"preflight: {counted(len(failed), 'check')} failed: {', '.join(failed)}")


def show(rows: Sequence[Row]) -> None:
    """Print each row in at most two lines, and how many traps they are about."""
    screen = console()
    short = [_print(row) for row in rows]
    counts = Counter[str](row.verdict for row in rows)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS if counts[verdict])
    numbers = {number for row in rows for number in row.traps}
    others = f"{len(traps()) - len(numbers)} of other stages"
    screen.print(f"\n{verdicts}: {counted(len(numbers), 'trap')} of {len(traps())} looked at, {others}")
    if any(short):
        screen.print("--json has every word")


def _print(row: Row) -> bool:
    """Print a row, the measured value first; return whether words were left out, since two lines do not hold them."""
    measured = row.measured + (f" (arm {', '.join(row.arms)})" if row.arms else "")
    screen, expected = console(), f"expected {row.expected}"
    room = screen.width - _NAME - 7
    lines = wrap("; ".join(filter(None, (measured, row.cure, expected))), room, break_on_hyphens=False)
    if row.verdict == "pass" and len(lines) > _LINES:
        lines = wrap(measured, room, break_on_hyphens=False)
    for number, line in enumerate(lines[:_LINES]):
        head = (f"{row.verdict:5} ", _COLOURS[row.verdict]), f"{row.check:{_NAME}} "
        more = number == _LINES - 1 and len(lines) > _LINES
        shown = shorten(f"{line} {lines[number + 1]}", room, placeholder=" …") if more else line
        screen.print(styled(*(head if number == 0 else (" " * (_NAME + 7),)), shown), soft_wrap=True)
    return len(lines) > _LINES
