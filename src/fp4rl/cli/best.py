"""`fp4rl report --best`: the best number of each category, one's own and reported ones apart."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fp4rl.cli.terminal import console, leave_out, print_json, table
from fp4rl.lab.files import json_ready

if TYPE_CHECKING:
    from fp4rl.lab.report.scores import Mean


def show_best(root: Path, *, as_json: bool = False) -> None:
    """Print the best number of each category over the suites below `root`, and of the reported experiments."""
    from fp4rl.lab.report.best import own_best, reported_best

    own, others = own_best(root, leave_out), reported_best()
    if as_json:
        print_json(json_ready({"own": [asdict(row) for row in own], "reported": [asdict(row) for row in others]}))
        return
    screen = console()
    rows = [
        (row.task, f"{row.trained_under}, {row.measured_under}", row.name, _accuracy(row.accuracy), str(row.of))
        for row in own
    ]
    screen.print(
        table("task", "trained, measured", "best=", "accuracy %>", "of>", rows=rows, title="own, % [95 % over seeds]")
    )
    if not rows:
        screen.print(f"no finished run of a suite below {root} counts")
    told = [
        (row.model, row.category, row.id, f"{row.accuracy:.2f}", str(row.of), "; ".join(row.confounds))
        for row in others
    ]
    columns = ("model", "format", "best=", "accuracy %>", "of>", "what speaks against it")
    screen.print()
    screen.print(table(*columns, rows=told, title="reported elsewhere, single runs"))
    screen.print(
        "`of`: the best of so many; the more, the higher by chance alone. Reported numbers and one's own are of other "
        "models, data and code: they stand apart and are not compared."
    )


def _accuracy(mean: "Mean") -> str:
    return f"{mean.value:.1f}" + ("" if mean.low is None else f" [{mean.low:.1f}, {mean.high:.1f}]")
