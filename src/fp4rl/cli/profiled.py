"""Where the time of runs went, one column an arm: what `fp4rl run --profile` prints."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from fp4rl.lab.matrix import PlannedRun


def profiled(runs: "Sequence[PlannedRun]", root: Path) -> Table:
    """Write `profile.md` into the folder of every run, and return seconds a step and shares by arm."""
    from fp4rl.lab.folders import run_folder
    from fp4rl.lab.profile import WHAT, write_profile

    by_arm: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        shares = write_profile(run_folder(root, run.suite, run.run_id))
        by_arm.setdefault(run.arm, []).append({one.name: one.seconds for one in shares})
    means = {arm: {name: mean(s.get(name, 0.0) for s in seeds) for name in WHAT} for arm, seeds in by_arm.items()}
    table = Table(
        title="Where a step goes, s and share of it",
        title_justify="left",
        caption_justify="left",
        caption="all steps but the first, mean over seeds; each run's own table is its profile.md",
    )
    table.add_column("work", no_wrap=True)
    for arm in means:
        table.add_column(arm, justify="right")
    whole = {arm: sum(seconds.values()) for arm, seconds in means.items()}
    table.add_row("all", *(f"{seconds:.3f}" for seconds in whole.values()), end_section=True)
    for name in sorted(WHAT, key=lambda name: -max(seconds[name] / whole[arm] for arm, seconds in means.items())):
        if any(seconds[name] for seconds in means.values()):
            table.add_row(name, *(f"{s[name]:.3f} {s[name] / whole[arm]:.0%}" for arm, s in means.items()))
    return table
