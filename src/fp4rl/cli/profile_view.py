"""Where the time of a step goes, as tables that fit the width."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from rich.console import Group

from fp4rl.cli.terminal import table
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.profile import WHAT, write_profile

_CELL = len("12.345 100%")  # of a table of times
_FRAME = 3  # what a column adds to its widest cell: a line and a space on both sides


def profiled(runs: Sequence[PlannedRun], root: Path, width: int) -> Group:
    """Write `profile.md` into the folder of every run; return tables of seconds a step and shares by arm, each of as
    many arms as fit into `width` columns."""
    by_arm: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(write_profile(run_folder(root, run.suite, run.run_id)))
    means = {arm: {name: mean(s.get(name, 0.0) for s in seeds) for name in WHAT} for arm, seeds in by_arm.items()}
    whole = {arm: sum(seconds.values()) for arm, seconds in means.items()}
    names = [name for name in WHAT if any(seconds[name] for seconds in means.values())]
    names.sort(key=lambda name: -max(seconds[name] / whole[arm] for arm, seconds in means.items()))
    beside = width - max(map(len, names)) - _FRAME - 1
    tables = []
    for arms in _fitting(means, beside):
        made = table("work=", *(f"{arm}>" for arm in arms), lines=True)
        made.add_row("all", *(f"{whole[arm]:.3f}" for arm in arms), end_section=True)
        for name in names:
            made.add_row(name, *(f"{means[arm][name]:.3f} {means[arm][name] / whole[arm]:.0%}" for arm in arms))
        tables.append(made)
    tables[0].title = "Where a step goes, s and share of it"
    tables[-1].caption = "all steps but the first, mean over seeds; each run's own table is its profile.md"
    return Group(*tables)


def _fitting(arms: Mapping[str, object], width: int) -> Iterator[list[str]]:
    """Yield the arms in groups, in order, whose columns take at most `width` together; at least one arm each."""
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
