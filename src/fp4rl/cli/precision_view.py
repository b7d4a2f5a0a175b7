"""The table of a precision that changes: which steps of which arms compute a point in which format."""

from collections.abc import Sequence

from fp4rl.cli.terminal import console, table
from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.injection import Injection
from fp4rl.spec.precision import Stage


def print_precision(runs: Sequence[PlannedRun]) -> None:
    """Print the stages of every schedule, once for all arms that share them; nothing where no precision changes."""
    arms: dict[tuple[tuple[str, str, str], ...], dict[str, None]] = {}
    for run in runs:
        if stages := precision_stages(run):
            arms.setdefault(tuple(stages), {})[run.arm] = None
    rows = [(", ".join(names) if not i else "", *row) for stages, names in arms.items() for i, row in enumerate(stages)]
    if rows:
        title = "precision in rollouts and training (evaluations are in the last format)"
        console().print(table("arm", "point", "steps>", "computed in", rows=rows, title=title))


def precision_stages(run: PlannedRun) -> list[tuple[str, str, str]]:
    """Return (point, steps, what it is computed in) for each stage of each point of a run whose precision changes."""
    injection, steps = run.experiment.injection, run.experiment.training.steps
    if injection is None or injection.schedule is None:
        return []
    return [
        (point, f"{span[0]} to {span[-1]}" if len(span) > 1 else str(span[0]), _computed(injection, point, stage))
        for point, own in injection.schedule.points.items()
        for stage, span in own.stages(steps).items()
    ]


def _computed(injection: Injection, point: str, stage: Stage) -> str:
    before, after = (
        ", ".join(dict.fromkeys(fmt.name for fmt in formats)) or "none"
        for formats in (injection.formats_before(point), injection.formats_at(point))
    )
    return {"before": before, "after": after, "blend": f"a blend of {before} and {after}"}[stage]
