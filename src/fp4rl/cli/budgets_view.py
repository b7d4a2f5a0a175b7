"""What training took, as a table, and the equal-budget control that a suite lacks, as YAML to be pasted."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.padding import Padding

from fp4rl.cli.terminal import console, print_indented, table

if TYPE_CHECKING:
    from fp4rl.lab.compare.budgets import Budgets
    from fp4rl.lab.compare.controls import MissingControl
    from fp4rl.lab.spent import Spent, TotalSpent

_COLUMNS = {"steps": "steps", "updates": "updates", "tokens": "tokens", "cpu_s": "CPU s", "gpu_s": "GPU s"}
_COLUMNS |= {"wall_s": "wall s", "repeated": "repeated"}


def print_budgets(sides: "Budgets") -> None:
    """Print what a run of each side took, where stages, teachers or other budgets make that a question."""
    both = sides.treatment, sides.control
    if sides.sentence() or any(side.stages.steps != 0 or side.teacher is not None for side in both):
        _print([pair for name, side in zip(sides.names, both, strict=True) for pair in rows_of(name, side)])


def print_spent(total: "TotalSpent") -> None:
    """Print what one run took."""
    _print(rows_of("training", total))


def rows_of(name: str, total: "TotalSpent") -> "list[tuple[str, Spent]]":
    """Return the rows of one side: all that led to its weights, and what of it stages and a teacher took."""
    staged = [("  of it stages", total.stages)] if total.stages.steps != 0 else []
    taught = [("  of it its teacher", total.teacher)] if total.teacher is not None else []
    return [(name, total.in_all), *staged, *taught]


def print_missing(controls: "Iterable[MissingControl]") -> None:
    """Print what questions lack that are not at equal budget, and what is to be pasted into the suite's file."""
    for lacking in controls:
        print_indented(("unequal budget", "yellow"), f": {lacking.sentence()}", by=0)
        for line in lacking.as_yaml().splitlines():
            console().print(f"  {line}", soft_wrap=True)


def _print(rows: "list[tuple[str, Spent]]") -> None:
    columns = {
        key: heading for key, heading in _COLUMNS.items() if key != "repeated" or any(s.repeated for _, s in rows)
    }
    shown = [(name, *(_number(getattr(spent, key)) for key in columns)) for name, spent in rows]
    headings = [f"{heading}>" for heading in columns.values()]
    console().print(Padding(table("training of a run", *headings, rows=shown), (0, 0, 0, 2)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
