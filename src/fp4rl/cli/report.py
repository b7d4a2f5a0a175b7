"""`fp4rl report`: print the comparison of a suite's runs, and write it as one HTML file."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, leave_out, print_json
from fp4rl.lab.files import json_ready, write_whole
from fp4rl.spec.errors import InvalidValueError

Form = Literal["html", "md", "csv"]
_NAMES: dict[Form, str] = {"html": "HTML", "md": "Markdown", "csv": "CSV"}


def command(
    suite: Annotated[str | None, typer.Argument(help="Folder of a suite, or its name below --runs.")] = None,
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    form: Annotated[
        Form, typer.Option("--format", help="Of the file that is written: report.html, .md or .csv.")
    ] = "html",
    best: Annotated[
        bool, typer.Option("--best", help="Instead: the best of each category over all suites, and of reported ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the comparison table of a suite and write report.html beside its runs; or report.md, or report.csv.

    Example: `fp4rl report runs/quickstart`
    """
    if best:
        from fp4rl.cli.best import show_best

        show_best(Path(suite) if suite is not None and Path(suite).is_dir() else runs, as_json=as_json)
        return
    if suite is None:
        raise InvalidValueError(f"name a suite below {runs}, or ask for --best")
    show(Path(suite) if Path(suite).is_dir() else runs / suite, ledger=ledger, form=form, as_json=as_json)


def show(folder: Path, *, ledger: str | None = None, form: Form = "html", as_json: bool = False) -> None:
    """Print the comparison table of a suite and write its report beside its runs. `ledger`: the address of the ledger
    with the spread of repeats, where it is not the folder's own."""
    from fp4rl.lab.report.collect import collect  # these import the statistics, which `--help` needs not
    from fp4rl.lab.report.exports import markdown, table_csv
    from fp4rl.lab.report.html import render
    from fp4rl.lab.report.terminal import terminal

    write = {"html": render, "md": markdown, "csv": table_csv}[form]
    report = collect(folder, ledger)
    for damage in report.damages:
        leave_out(damage)
    name = _NAMES[form]
    page: Path | None = folder / f"report.{form}"
    try:
        write_whole(folder / f"report.{form}", write(report))
    except OSError as error:  # a read-only folder is still reported on
        page = None
        console(stderr=True).print(f"no {name} report: {folder} cannot be written ({error.strerror})", soft_wrap=True)
    if as_json:
        print_json(json_ready(report.as_dict() | {form: page}))
        return
    console().print(terminal(report, console().width))
    if page is not None:
        console().print(f"{name} report: {page}", soft_wrap=True)
