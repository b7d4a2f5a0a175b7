"""`fp4rl preflight`: every check that acts before a run, a row each, in seconds."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten, wrap
from typing import Annotated, Any

import typer

from fp4rl.cli.described import described_by, runs_described, selected
from fp4rl.cli.options import AsJson, AtScale, Overrides, ReportTo, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, styled
from fp4rl.lab.preflight.preflight import preflight
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
    levels: tuple[Needs, ...] = ("nothing",) if static else ("nothing", "model", "weights")
    if not static:
        quiet()
        ready_to_round()
    subject = Subject(described, planned, runs, tuple(report_to or ()))
    with progress() as advance:
        rows = [*preflight(subject, levels, partial(advance, "preflight"))]
    if as_json:
        print_json(as_dict(rows, planned[0].suite))
    else:
        show(rows)
    require_passed(rows)


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
