"""The stages of a plan: which run takes weights from which other, in which order, and the steps of all together."""

from collections.abc import Sequence
from pathlib import Path

from fp4rl.cli.terminal import console, table
from fp4rl.lab.budget import Budget, budget_of
from fp4rl.lab.compare.beforehand import beforehand
from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.linked import START, TEACHER, links


def budgets_of(runs: Sequence[PlannedRun], root: Path) -> dict[str, Budget | None]:
    """Return arm -> what leads to its weights: its own training and that of its stages and teachers; None where one of
    these is a run that is not below `root`."""
    arms = {run.arm: run.experiment for run in reversed(runs)}
    known = {arm: beforehand(experiment, arms, root) for arm, experiment in arms.items()}
    return {arm: None if before is None else budget_of(*before.whole, arms[arm]) for arm, before in known.items()}


def print_stages(runs: Sequence[PlannedRun], root: Path) -> None:
    """Print the order of the arms with what each takes and its steps; nothing where no run takes another's weights."""
    first = {run.arm: run for run in reversed(runs)}
    arms = [first[arm] for arm in dict.fromkeys(run.arm for run in runs)]
    if not any(links(run.experiment) for run in arms):
        return
    whole = budgets_of(runs, root)
    rows = [
        (
            run.arm,
            _source(run, START),
            _source(run, TEACHER),
            str(run.experiment.training.steps),
            *(("?", "?") if (budget := whole[run.arm]) is None else (str(budget.steps), str(budget.updates))),
        )
        for run in arms
    ]
    columns = ("arm", "starts from", "teacher", "steps>", "in all>", "updates in all>")
    title = "stages, in their order: a run begins when those that it takes weights from are finished"
    console().print(table(*columns, rows=rows, title=title))


def _source(run: PlannedRun, key: str) -> str:
    link = links(run.experiment).get(key)
    if link is None:
        return "its model" if key == START else "-"
    return link.arm or getattr(link, "run", None) or getattr(link, "path", None) or "-"
