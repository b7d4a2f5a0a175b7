"""The stages of a plan: which run takes weights from which other, in which order, and the steps of all together."""

from collections.abc import Mapping, Sequence

from fp4rl.cli.terminal import console, table
from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.linked import START, TEACHER, links


def total_steps(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> int:
    """Return the steps that lead to a run's weights: its own and those of the runs that it starts from, as far as they
    are planned with it."""
    start = runs.get(run.needs.get(START, ""))
    return run.experiment.training.steps + (total_steps(start, runs) if start is not None else 0)


def print_stages(runs: Sequence[PlannedRun]) -> None:
    """Print the order of the arms with what each takes and its steps; nothing where no run takes another's weights."""
    by_id = {run.run_id: run for run in runs}
    first = {run.arm: run for run in reversed(runs)}
    arms = [first[arm] for arm in dict.fromkeys(run.arm for run in runs)]
    if not any(links(run.experiment) for run in arms):
        return
    rows = [
        (
            run.arm,
            _source(run, START),
            _source(run, TEACHER),
            str(run.experiment.training.steps),
            str(total_steps(run, by_id)),
            str(_updates(run, by_id)),
        )
        for run in arms
    ]
    columns = ("arm", "starts from", "teacher", "steps>", "in all>", "updates in all>")
    title = "stages, in their order: a run begins when those that it takes weights from are finished"
    console().print(table(*columns, rows=rows, title=title))


def _updates(run: PlannedRun, runs: Mapping[str, PlannedRun]) -> int:
    start, recipe = runs.get(run.needs.get(START, "")), run.experiment.training
    return recipe.steps * recipe.updates_per_step + (_updates(start, runs) if start is not None else 0)


def _source(run: PlannedRun, key: str) -> str:
    link = links(run.experiment).get(key)
    if link is None:
        return "its model" if key == START else "-"
    return link.arm or getattr(link, "run", None) or getattr(link, "path", None) or "-"
