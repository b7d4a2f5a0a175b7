"""`fp4rl plan`: what a file describes: arms, questions, runs with their ids, and which are done; no model, no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.options import AsJson, Overrides, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_json, styled, table
from fp4rl.spec.model import Embedded
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from fp4rl.lab.matrix import PlannedRun
    from fp4rl.spec.experiment import Experiment, Suite


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Print what a file describes: its arms, its questions, and its runs with their ids.

    Example: `fp4rl plan catalogue/quickstart training.steps=10`
    """
    from fp4rl.cli.described import described_by, runs_described, warnings_of, what_interrupting_costs
    from fp4rl.lab.provenance import missing_files
    from fp4rl.lab.runner import split_finished

    described = described_by(spec, overrides or [])
    runs_planned = runs_described(described, spec.stem)
    finished, _ = split_finished(runs_planned, runs)
    if as_json:
        print_json([_row(run, run in finished) for run in runs_planned])
        return
    screen = console()
    _print_what(screen, runs_planned[0].experiment)
    _print_recipes(screen, runs_planned)
    screen.print(what_interrupting_costs(runs_planned[0].experiment.training.save_freq))
    _print_suite(screen, described)
    _print_runs(screen, runs_planned, finished)
    for line in warnings_of(runs_planned):
        screen.print(styled(("warning", "yellow"), f": {line}"))
    for line in missing_files(runs_planned):
        screen.print(styled(("missing", "yellow"), f": {line}"))


def _print_what(screen: "Console", experiment: "Experiment") -> None:
    """What the first run trains; the arms say in which keys the others differ."""
    recipe, evaluation = experiment.training, experiment.evaluation
    model = (
        experiment.model.path or f"the embedded model ({(experiment.model.embedded or Embedded()).hidden_size} wide)"
    )
    screen.print(
        f"{recipe.algorithm} on {experiment.task.name}, {counted(recipe.steps, 'step')} of {recipe.train_batch_size} x "
        f"{counted(recipe.rollout_n, 'answer')}, from {model}; evaluated on {counted(evaluation.count, 'problem')}",
    )


def _print_recipes(screen: "Console", runs: "Sequence[PlannedRun]") -> None:
    """Every number that decides what is learned, named or the algorithm's own; once for all arms that share them."""
    recipes: dict[str, dict[str, None]] = {}
    for run in runs:
        recipe = run.experiment.training
        numbers = "; ".join(f"{key} {value}" for key, value in recipe.effective().items())
        recipes.setdefault(f"{recipe.algorithm} ({recipe.published.source}): {numbers}", {})[run.arm] = None
    for recipe_in_words, arms in recipes.items():
        of = f" of {', '.join(arms)}" if len(recipes) > 1 else ""
        screen.print(f"recipe{of}: {recipe_in_words}")


def _print_suite(screen: "Console", described: "Suite | Experiment") -> None:
    from rich.table import Table

    from fp4rl.spec.experiment import Suite

    if not isinstance(described, Suite):
        return
    arms = ((name, _as_line(change)) for name, change in described.arms.items())
    screen.print(table("arm", "differs from the base in", rows=arms, title="arms", lines=True))
    for key, values in described.axes.items():
        screen.print(f"each with {key} = {', '.join(map(str, values))}")
    questions = Table.grid(padding=(0, 1))  # a long question wraps below itself
    for number, question in enumerate(described.comparisons, 1):
        sides = f"{question.treatment} against {question.control}"
        questions.add_row(f"{number}.", styled(f"{question.question} ", (f"({sides})", "dim")))
    if questions.row_count:
        screen.print(questions)
    if not described.comparisons:
        screen.print("no comparisons: the report will show the arms side by side and say nothing")


def _as_line(change: dict[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(change, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return text[1:-1] or "-"


def _print_runs(screen: "Console", runs: "Sequence[PlannedRun]", finished: "Sequence[PlannedRun]") -> None:
    title = f"{runs[0].suite}: {counted(len(runs), 'run')}, {len(finished)} finished"
    rows = ((run.arm, str(run.seed), run.run_id, "finished" if run in finished else "to do") for run in runs)
    screen.print(table("arm", "seed>", "run", "state", rows=rows, title=title, lines=True))


def _row(run: "PlannedRun", finished: bool) -> dict[str, object]:
    return {
        "suite": run.suite,
        "arm": run.arm,
        "seed": run.seed,
        "run_id": run.run_id,
        "spec_digest": run.spec_digest,
        "finished": finished,
    }
