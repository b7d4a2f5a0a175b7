"""`fp4rl report`: print the comparison of a suite's runs, and write it as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, leave_out, print_json
from fp4rl.lab.files import json_ready, write_whole


def command(
    suite: Annotated[str, typer.Argument(help="Folder of a suite, or its name below --runs.")],
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print the comparison table of a suite and write report.html beside its runs.

    Example: `fp4rl report runs/quickstart`
    """
    show(Path(suite) if Path(suite).is_dir() else runs / suite, ledger=ledger, as_json=as_json)


def show(folder: Path, *, ledger: str | None = None, as_json: bool = False) -> None:
    """Print the comparison table of a suite and write its HTML report beside its runs. `ledger`: the address of the
    ledger with the spread of repeats, where it is not the folder's own."""
    from fp4rl.lab.report.collect import collect  # these import the statistics, which `--help` needs not
    from fp4rl.lab.report.html import render
    from fp4rl.lab.report.terminal import terminal

    report = collect(folder, ledger)
    for damage in report.damages:
        leave_out(damage)
    page: Path | None = folder / "report.html"
    try:
        write_whole(folder / "report.html", render(report))
    except OSError as error:  # a read-only folder is still reported on
        page = None
        console(stderr=True).print(f"no HTML report: {folder} cannot be written ({error.strerror})", soft_wrap=True)
    if as_json:
        print_json(json_ready(report.as_dict() | {"html": page}))
        return
    console().print(terminal(report, console().width))
    if page is not None:
        console().print(f"HTML report: {page}", soft_wrap=True)
