"""One picture of watched runs, as lines of a given width and number: what does not fit is left out, least wanted first.

Names of runs are never cut: columns are dropped beside a long one. Sentences are, with an ellipsis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.text import Text

from fp4rl.cli.terminal import EIGHTHS, styled
from fp4rl.lab.foreign.joined import readable
from fp4rl.lab.status import WORDS
from fp4rl.lab.watching import Seen, View
from fp4rl.spec.words import counted

STATUS = {
    "running": "bold cyan",
    "done": "green",
    "planned": "dim",
    "stopped": "yellow",
    "interrupted": "yellow",
    "invalid": "red",
    "damaged": "red",
    "failed": "bold red",
    "lost": "bold red",
}
HEALTH = {"not judged": "dim", "ok": "green", "watch": "yellow", "alarm": "bold red"}
_LAST = "Ctrl-C ends the watching, not the runs"
_BLOCK = 7  # lines of a run's own block: its place, five curves, its health
_TALL = 4  # most lines of a curve
_WIDE = 3  # most cells of a step
_LABEL = 32  # name and first and last value of a curve


def frame(view: View, width: int, height: int) -> list[Text]:
    """Return the picture, at most `height` lines of at most `width` cells."""
    if view.missing:
        waiting = [styled((readable(view.title), "bold")), styled(readable(view.missing))]
        return _cut([*waiting, styled(("waiting for it; Ctrl-C ends", "dim"))], width, height)
    head, reasons, warnings = _head(view, width), _reasons(view), _warnings(view)
    runs = sorted(view.runs, key=lambda run: WORDS.index(run.status.word))
    own = [run for run in runs if run.curves and run.status.word == "running"] or [run for run in runs if run.curves]
    room = height - len(head) - 1  # and the last line
    told = min(len(reasons), max(1, room // 8)) + min(len(warnings), max(1, room // 10))
    block = _BLOCK if own else 0
    listed = _table(runs, width, max(3, room - told - block))
    reasons, warnings = reasons[: max(1, room // 8)], warnings[: max(1, room // 10)]
    parts = [head + listed, reasons]
    room -= len(listed) + len(reasons) + len(warnings)
    parts += [*_blocks(own, width, room), [*warnings, styled((_LAST, "dim"))]]
    spare = height - sum(map(len, parts))
    return _cut([line for part in _apart(parts, spare) for line in part], width, height)


def _apart(parts: list[list[Text]], spare: int) -> list[list[Text]]:
    """Return the parts with an empty line after each but the last, from the first on as far as lines are to spare."""
    told = [part for part in parts if part]
    return [[*part, Text()] if number < min(spare, len(told) - 1) else part for number, part in enumerate(told)]


def _cut(lines: Sequence[Text], width: int, height: int) -> list[Text]:
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return list(lines[:height])


def _head(view: View, width: int) -> list[Text]:
    counts = ", ".join(f"{count} {word}" for word, count in view.counts.items())
    left = f"about {duration(view.left_s)} left" if view.left_s is not None else ""
    title, state = readable(view.title), f"{counted(len(view.runs), 'run')}: {counts}"
    line, first = ("  ".join(filter(None, parts)) for parts in ((title, state, left), (title, left)))
    if cell_len(line) <= width:
        return [styled((title, "bold"), line.removeprefix(title))]
    return [styled((title, "bold"), first.removeprefix(title)), styled(state)]


@dataclass(frozen=True)
class _Column:
    """A column: `wanted`, the larger the longer it stays, and its cell for a run."""

    heading: str
    wanted: int
    cell: Callable[[Seen], tuple[str, str]]
    right: bool = False


_COLUMNS = (
    _Column("run", 9, lambda run: (readable(run.name), "bold" if run.status.word == "running" else "")),
    _Column("status", 8, lambda run: (run.status.word, STATUS[run.status.word])),
    _Column("step", 7, lambda run: (f"{run.step}/{run.steps}" if run.step else "-", ""), right=True),
    _Column("left", 4, lambda run: ("-" if run.left_s is None else duration(run.left_s), ""), right=True),
    _Column("accuracy", 5, lambda run: (_last(run, "accuracy", ".1%"), ""), right=True),
    _Column("reward", 3, lambda run: (_last(run, "reward", ".3g"), ""), right=True),
    _Column("length", 1, lambda run: (_last(run, "length", ".0f"), ""), right=True),
    _Column("entropy", 2, lambda run: (_last(run, "entropy", ".3f"), ""), right=True),
    _Column("health", 6, lambda run: (run.health if run.curves else "-", HEALTH[run.health] if run.curves else "dim")),
)


def _table(runs: Sequence[Seen], width: int, most: int) -> list[Text]:
    """Return a heading and a line a run; where they are more than `most` lines, the last one counts the others."""
    rows = runs if len(runs) < most else runs[: most - 2]
    columns = list(_COLUMNS)
    cells = {column.heading: [column.cell(run) for run in rows] for column in columns}
    widths = {name: max(map(cell_len, (name, *(text for text, _ in own)))) for name, own in cells.items()}
    while len(columns) > 1 and sum(widths[column.heading] + 2 for column in columns) - 2 > width:
        columns.remove(min(columns, key=lambda column: column.wanted))
    lines = [_row([(column, column.heading, "dim") for column in columns], widths)]
    own = range(len(rows))
    lines += [_row([(column, *cells[column.heading][number]) for column in columns], widths) for number in own]
    if others := runs[len(rows) :]:
        words = View("", tuple(others)).counts
        lines.append(
            styled((f"and {len(others)} more: " + ", ".join(f"{n} {word}" for word, n in words.items()), "dim"))
        )
    return lines


def _row(cells: Sequence[tuple[_Column, str, str]], widths: dict[str, int]) -> Text:
    line = Text()
    for number, (column, text, style) in enumerate(cells):
        pad = " " * (widths[column.heading] - cell_len(text))
        line.append("  " if number else "")
        line.append(pad if column.right else "").append(text, style=style).append("" if column.right else pad)
    line.rstrip()
    return line


def _reasons(view: View) -> list[Text]:
    """Return why runs are not as they should be, the most serious first."""
    wrong = sorted(
        (run for run in view.runs if run.status.word in WORDS[1:7]), key=lambda r: WORDS.index(r.status.word)
    )
    return [
        styled((f"{readable(run.name)} {run.status.word}", STATUS[run.status.word]), f": {readable(run.status.why)}")
        for run in wrong
    ]


def _warnings(view: View) -> list[Text]:
    """Return the last warning of each run, those of running runs first, then the ones before."""
    told = sorted((run for run in view.runs if run.warnings), key=lambda r: WORDS.index(r.status.word))
    depth = max((len(run.warnings) for run in told), default=0)
    lines = [(run, run.warnings[-n]) for n in range(1, depth + 1) for run in told if n <= len(run.warnings)]
    return [styled(("warning", "yellow"), f" {readable(run.name)}: {readable(line)}") for run, line in lines]


def _blocks(runs: Sequence[Seen], width: int, room: int) -> list[list[Text]]:
    """Return as many runs' own blocks as have room, their curves as tall as the room allows."""
    count = min(len(runs), room // _BLOCK)
    if not count:
        return []
    room -= count + 1 if room > count * (_BLOCK + 1) else 0  # empty lines between them, where there is room
    curves = sum(len(run.curves) for run in runs[:count])
    tall = max(1, min(_TALL, (room - 2 * count - sum(map(_findings, runs[:count]))) // max(1, curves)))
    return [_block(run, width, tall) for run in runs[:count]]


def _findings(run: Seen) -> int:
    return max(0, len(run.findings) - 1)


def _block(run: Seen, width: int, tall: int) -> list[Text]:
    where = f"at {run.where}" if run.where else run.status.word
    where += f", {run.pace_s:.3g} s a step" if run.pace_s is not None else ""
    where += f", about {duration(run.left_s)} left" if run.left_s is not None else ""
    lines = [styled((readable(run.name), "bold"), f"  {where}")]
    for name, values in run.curves.items():
        rows = plot(values, max(8, width - _LABEL - 2), tall)
        label = f"  {name:<9} {values[0]:>9.4g} to {values[-1]:<9.4g}"
        lines += [styled(" " * _LABEL, (row, "cyan")) for row in rows[:-1]]
        lines.append(styled(f"{label:<{_LABEL}}", (rows[-1], "cyan")))
    if not run.findings:
        return [*lines, styled("  health    ", (run.health, HEALTH[run.health]))]
    return lines + [
        styled(
            "  health    ", (finding.state, HEALTH[finding.state]), f" {finding.check}: {readable(finding.evidence)}"
        )
        for finding in run.findings
    ]


def _last(run: Seen, name: str, form: str) -> str:
    return format(run.curves[name][-1], form) if name in run.curves else "-"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit} {rest} {below}" if rest else f"{whole // size} {unit}"
    return f"{whole} s"


def plot(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """Return a curve of bars, lines from top to bottom: means of neighbouring values, lowest to highest value.

    A value that is not finite is an `×` in the lowest line.
    """
    count = min(width, len(values))
    wide = max(1, min(_WIDE, width // max(1, count)))
    edges = [i * len(values) // count for i in range(count + 1)] if count else [0]
    means = [
        math.fsum(values[a:b]) / (b - a) if all(map(math.isfinite, values[a:b])) else math.nan
        for a, b in pairwise(edges)
    ]
    finite = [value for value in means if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span, top = (high - low), 8 * height
    levels = [1 + round((v - low) / span * (top - 1)) if span > 0 else top // 2 for v in means if math.isfinite(v)]
    bars = iter(levels)
    columns = [next(bars) if math.isfinite(value) else None for value in means]
    rows = range(height - 1, -1, -1)
    return ["".join(_part(level, row) * wide for level in columns).rstrip() for row in rows]


def _part(level: int | None, row: int) -> str:
    if level is None:
        return " " if row else "×"
    return EIGHTHS[max(0, min(8, level - 8 * row))]
