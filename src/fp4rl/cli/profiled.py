"""Where the time of runs went, one column an arm: what `fp4rl run --profile` prints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from fp4rl.cli.terminal import table

if TYPE_CHECKING:
    from fp4rl.lab.matrix import PlannedRun

_CELL = len("12.345 100%")
_FRAME = 3  # what a column adds to its widest cell: a line and a space on both sides


def profiled(runs: "Sequence[PlannedRun]", root: Path, width: int) -> Group:
    """Write `profile.md` into the folder of every run, and return seconds a step and shares by arm: tables of as many
    arms as fit `width` columns, each with the same rows."""
    from fp4rl.lab.folders import run_folder
    from fp4rl.lab.profile import WHAT, write_profile

    by_arm: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(write_profile(run_folder(root, run.suite, run.run_id)))
    means = {arm: {name: mean(s.get(name, 0.0) for s in seeds) for name in WHAT} for arm, seeds in by_arm.items()}
    whole = {arm: sum(seconds.values()) for arm, seconds in means.items()}
    rows = [name for name in WHAT if any(seconds[name] for seconds in means.values())]
    rows.sort(key=lambda name: -max(seconds[name] / whole[arm] for arm, seconds in means.items()))
    beside = width - max(map(len, rows)) - _FRAME - 1
    tables = [_table({arm: means[arm] for arm in arms}, rows) for arms in _fitting(means, beside)]
    tables[0].title = "Where a step goes, s and share of it"
    tables[-1].caption = "all steps but the first, mean over seeds; each run's own table is its profile.md"
    return Group(*tables)


def _fitting(arms: Mapping[str, object], width: int) -> Iterator[list[str]]:
    """The arms in their order, in groups whose columns together take at most `width`; one arm at least."""
    group: list[str] = []
    used = 0
    for arm in arms:
        needed = max(len(arm), _CELL) + _FRAME
        if group and used + needed > width:
            yield group
            group, used = [], 0
        group.append(arm)
        used += needed
    yield group


def _table(means: Mapping[str, Mapping[str, float]], rows: Sequence[str]) -> Table:
    whole = {arm: sum(seconds.values()) for arm, seconds in means.items()}
    made = table("work=", *(f"{arm}>" for arm in means), lines=True)
    made.add_row("all", *(f"{seconds:.3f}" for seconds in whole.values()), end_section=True)
    for name in rows:
        made.add_row(name, *(f"{s[name]:.3f} {s[name] / whole[arm]:.0%}" for arm, s in means.items()))
    return made
