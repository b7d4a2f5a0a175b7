"""`fp4rl quickstart`: train four recipes for the embedded model, and compare them in full precision and in 4 bits."""

from pathlib import Path

from fp4rl.cli.described import described_by
from fp4rl.cli.options import Address, AsJson, Jobs, Overrides, ReportTo, RunsRoot
from fp4rl.cli.report import show
from fp4rl.cli.run import carry_out_all, end


def command(
    overrides: Overrides = None,
    runs: RunsRoot = Path("runs"),
    jobs: Jobs = 2,
    report_to: ReportTo = None,
    ledger: Address = None,
    as_json: AsJson = False,
) -> None:
    """Build and warm up the embedded model, train every arm, and print the comparison with intervals.

    Finished runs are skipped, so a second call takes seconds. Example: `fp4rl quickstart seeds=[0,1,2,3]`
    """
    suite = described_by(Path("catalogue/quickstart"), overrides or [])
    outcome = carry_out_all(suite, "quickstart", runs, jobs, report_to or (), ledger, quiet=as_json)
    show(runs / "quickstart", ledger=ledger, as_json=as_json)
    end(outcome)
