"""`fp4rl quickstart`: four training recipes for the embedded model, compared in full precision and in 4 bits."""

from pathlib import Path
from typing import Annotated

import typer

from fp4rl.cli.options import Jobs, Overrides, ReportTo, RunsRoot
from fp4rl.cli.run import carry_out_all, end
from fp4rl.cli.terminal import console, print_json


def command(
    overrides: Overrides = None,
    runs: RunsRoot = Path("runs"),
    jobs: Jobs = 2,
    report_to: ReportTo = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Build and warm up the embedded model, train every arm, and print what the intervals allow one to say.

    Finished runs are skipped, so a second call takes seconds. Example: `fp4rl quickstart seeds=[0,1,2,3]`
    """
    from fp4rl.lab.catalogue import named
    from fp4rl.spec.door import load_spec

    suite = load_spec(named("quickstart"), overrides or [])
    outcome = carry_out_all(suite, "quickstart", runs, jobs, report_to=report_to or (), quiet=as_json)
    show(runs / "quickstart", as_json=as_json)
    end(outcome)


def show(suite_folder: Path, *, as_json: bool = False) -> None:
    """Print the comparison table of a suite and write its HTML report beside its runs."""
    from fp4rl.lab.report.collect import collect
    from fp4rl.lab.report.html import write_html
    from fp4rl.lab.report.terminal import terminal

    report = collect(suite_folder)
    page = write_html(report, suite_folder / "report.html")
    if as_json:
        print_json(report.as_dict())
        return
    console().print(terminal(report))
    console().print(f"HTML report: {page}", highlight=False, soft_wrap=True)
