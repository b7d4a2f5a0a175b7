"""`fp4rl plan`: which runs a file describes, under which ids, and which of them are done; no model, no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import Overrides, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_json

if TYPE_CHECKING:
    from fp4rl.lab.matrix import PlannedRun


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    runs: RunsRoot = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print the runs that a file describes, with their ids.

    Example: `fp4rl plan catalogue/quickstart.yaml training.steps=10`
    """
    from rich.table import Table

    from fp4rl.cli.described import runs_of
    from fp4rl.lab.runner import split_finished

    found = runs_of(spec, overrides or [])
    finished, _ = split_finished(found, runs)
    if as_json:
        print_json([_row(run, run in finished) for run in found])
        return
    table = Table(title=f"{found[0].suite}: {len(found)} runs, {len(finished)} finished", title_justify="left")
    for name in ("arm", "seed", "run", "state"):
        table.add_column(name, justify="right" if name == "seed" else "left", overflow="fold")
    for run in found:
        table.add_row(run.arm, str(run.seed), run.run_id, "finished" if run in finished else "to do")
    console().print(table)


def _row(run: "PlannedRun", finished: bool) -> dict[str, object]:
    return {
        "suite": run.suite,
        "arm": run.arm,
        "seed": run.seed,
        "run_id": run.run_id,
        "spec_digest": run.spec_digest,
        "finished": finished,
    }
