"""Output that all verbs share: strings as they are, tables, plots of characters, JSON, progress, what was left out."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fp4rl.engines.environment import choose_backend
from fp4rl.lab.tables import WholeWords
from fp4rl.spec.errors import CheckFailed

_MANY = 6  # columns from which on a single space separates them, to fit into 80 characters
_FAULTS = 8  # of one kind
EIGHTHS = " ▁▂▃▄▅▆▇█"
# Light to dark for a growing value; the digit inside a cell keeps it readable without colour.
_HEAT = ("grey93", "light_goldenrod2", "orange1", "dark_orange3", "red3")
_left_out: set[str] = set()
_renamed: set[str] = set()


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal or COLUMNS; 100 columns without either (a pipe, a log).

    Strings are printed literally, brackets too, since answers, paths and errors come from outside; styles need `Text`.
    """
    screen = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = max(screen.width, 100)
    return screen


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return a line made of strings and (string, style) pairs."""
    return Text.assemble(*parts)


def print_indented(*parts: str | tuple[str, str], by: int = 2) -> None:
    """Print a line of `styled` parts, indented by `by` spaces also where it wraps."""
    console().print(Padding(styled(*parts), (0, 0, 0, by), expand=False))


def print_by_kind(faults: Iterable[tuple[str, str, str]]) -> None:
    """Print faults (kind, where, what), each kind with its number and the first few of it."""
    lines: dict[str, list[str]] = {}
    for kind, where, what in faults:
        lines.setdefault(kind, []).append(f"{where}: {what}" if where else what)
    for kind, of_kind in lines.items():
        console().print(f"{kind}: {len(of_kind)}")
        for line in of_kind[:_FAULTS]:
            print_indented(line)
        if len(of_kind) > _FAULTS:
            print_indented(f"and {len(of_kind) - _FAULTS} more (--json has all)")


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(value, indent=2, sort_keys=False, allow_nan=False))


def table(
    *columns: str,
    rows: Iterable[Sequence[str | Text]] = (),
    title: str | None = None,
    caption: str | None = None,
    lines: bool = False,
) -> Table:
    """Return a table of `rows`, with or without `lines` around its cells; no headings where all are empty.

    A column is given by its heading and a mark: `steps>` is right-aligned and never wraps (numbers), `run=` is
    left-aligned and never wraps (ids to copy), any other is left-aligned and wraps between words. Where the words do
    not fit side by side, the rows are stacked.
    """
    made = WholeWords(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.HEAVY_HEAD if lines else None,
        pad_edge=lines,
        padding=(0, 1) if lines else (0, 2 if len(columns) < _MANY else 1, 0, 0),
        show_header=any(column.strip("=>") for column in columns),
    )
    for column in columns:
        made.add_column(
            column.rstrip("=>"),
            justify="right" if column.endswith(">") else "left",
            no_wrap=column.endswith(("=", ">")),
            overflow="fold",
        )
    for row in rows:
        made.add_row(*row)
    return made


def log_curve(values: Sequence[float], width: int, height: int = 8) -> list[str]:
    """Return a bar chart as lines from top to bottom. Each column shows the largest of the values that fall on it.

    Zeros stay empty; the smallest other value fills the lowest row, so that its bar differs from the axis.
    """
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    columns = [max(values[a:b]) for a, b in pairwise(edges)]
    widen = max(1, width // max(1, len(columns)))
    positive = [v for v in columns if v > 0]
    if not positive:
        return ["(silent at every step)"]
    top, low = math.log10(max(positive)), math.log10(min(positive))
    rows = height if top > low else 1
    span = max(top - low, 1e-9)
    labels = {0: f"{min(positive):.3g}", rows - 1: f"{max(positive):.3g}"}
    levels = [0.0 if v <= 0 else 8 + (math.log10(v) - low) / span * (rows - 1) * 8 for v in columns]
    lines = []
    for row in range(rows - 1, -1, -1):
        cells = (EIGHTHS[max(0, min(8, round(level - 8 * row)))] for level in levels)
        lines.append(f"{labels.get(row, ''):>9} │" + "".join(cell * widen for cell in cells).rstrip())
    long = len(columns) * widen
    return [*lines, f"{'':>9} └{'─' * long}", f"{'step':>9}  0{len(values) - 1:>{max(1, long - 1)}}"]


def heat_strip(values: Sequence[float | None], low: float, high: float) -> Text:
    """Return a cell for each value: the closer to `high` (from `low`), the darker and the higher its digit (0-9)."""
    strip = Text()
    for value in values:
        if value is None or math.isnan(value):
            strip.append("·")
            continue
        share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
        colour = _HEAT[min(len(_HEAT) - 1, int(share * len(_HEAT)))]
        strip.append(str(min(9, int(share * 10))), style=f"black on {colour}")
    return strip


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (stage, done, total) that shows a bar with the time left on stderr, and nothing on a pipe."""
    screen, bars = console(stderr=True), dict[str, TaskID]()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as shown:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(stage, total=total)
            shown.update(bars[stage], completed=done)

        yield advance


def ready_to_round() -> None:
    """Choose the backend that FP4RL_BACKEND names, and show compilations; InvalidValueError if it cannot work."""
    screen = console(stderr=True)
    choose_backend(lambda message: screen.print(message, style="dim"))


def say_once(lines: Iterable[str], where: str = "") -> None:
    """Print warnings about a file or a command line on stderr, each once a command."""
    for line in lines:
        if f"{where}{line}" not in _renamed:
            _renamed.add(f"{where}{line}")
            console(stderr=True).print(f"warning: {where}{line}")


def leave_out(error: Exception) -> None:
    """Name something that cannot be read, once per command; the verb continues, and its exit code will be 1."""
    if str(error) not in _left_out:
        _left_out.add(str(error))
        console(stderr=True).print(f"left out: {error}", soft_wrap=True)


def forget_left_out() -> None:
    """Clear what was left out and what was said, for a new command line."""
    _left_out.clear()
    _renamed.clear()


def require_nothing_left_out() -> None:
    """Raise CheckFailed if anything was left out of this command line."""
    count = len(_left_out)
    if count:
        raise CheckFailed(f"{count} {'run is' if count == 1 else 'runs are'} damaged and left out, as named above")
