"""How to make the numbers of a report again."""

from fp4rl.lab.report.collect import SuiteReport


def commands(report: SuiteReport) -> list[tuple[str, str]]:
    """Return (command, what it does), in order."""
    name = report.name
    first = report.runs[0].planned if report.runs else None
    show = [] if first is None else [(f"fp4rl show {name}/{first.run_id}", "everything about one run")]
    return [
        ("pip install 'fp4rl[train,report]'", f"the code whose digest is {report.code_digest}; versions are below"),
        (f"fp4rl plan runs/{name}/suite.yaml", "what will run, and what is done already"),
        (f"fp4rl run runs/{name}/suite.yaml", "carries out the runs that are missing; finished runs stay"),
        (f"fp4rl report runs/{name}", "this page"),
        *show,
        (f"fp4rl archive {name}", "packs specs, logs, evidence and results with checksums"),
    ]
