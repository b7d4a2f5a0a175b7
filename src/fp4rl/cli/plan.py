"""`fp4rl plan`: what a file describes: arms, questions, runs with their ids, and which are done; no model, no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.options import AsJson, Overrides, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_json, styled
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
    found = runs_described(described, spec.stem)
    finished, _ = split_finished(found, runs)
    if as_json:
        print_json([_row(run, run in finished) for run in found])
        return
    screen = console()
    _print_what(screen, found[0].experiment)
    _print_recipes(screen, found)
    screen.print(what_interrupting_costs(found[0].experiment.training.save_freq), highlight=False)
    _print_suite(screen, described)
    _print_runs(screen, found, finished)
    for line in warnings_of(found):
        screen.print(styled(("warning", "yellow"), f": {line}"), highlight=False)
    for line in missing_files(found):
        screen.print(styled(("missing", "yellow"), f": {line}"), highlight=False)


def _print_what(screen: "Console", one: "Experiment") -> None:
    """What the first run trains; the arms say in which keys the others differ."""
    recipe, judged = one.training, one.evaluation
    model = one.model.path or f"the embedded model ({(one.model.embedded or Embedded()).hidden_size} wide)"
    screen.print(
        f"{recipe.algorithm} on {one.task.name}, {counted(recipe.steps, 'step')} of {recipe.train_batch_size} x "
        f"{counted(recipe.rollout_n, 'answer')}, from {model}; judged on {counted(judged.count, 'problem')}",
        highlight=False,
    )


def _print_recipes(screen: "Console", found: "Sequence[PlannedRun]") -> None:
    """Every number that decides what is learned, named or the algorithm's own; once for all arms that share them."""
    recipes: dict[str, dict[str, None]] = {}
    for run in found:
        recipe = run.experiment.training
        numbers = "; ".join(f"{key} {value}" for key, value in recipe.effective().items())
        recipes.setdefault(f"{recipe.algorithm} ({recipe.published.source}): {numbers}", {})[run.arm] = None
    for said, arms in recipes.items():
        of = f" of {', '.join(arms)}" if len(recipes) > 1 else ""
        screen.print(f"recipe{of}: {said}", markup=False, highlight=False)


def _print_suite(screen: "Console", described: "Suite | Experiment") -> None:
    from rich.table import Table

    from fp4rl.spec.experiment import Suite

    if not isinstance(described, Suite):
        return
    arms = Table(title="arms", title_justify="left")
    for name in ("arm", "differs from the base in"):
        arms.add_column(name, overflow="fold")
    for name, change in described.arms.items():
        arms.add_row(name, _as_line(change))
    screen.print(arms)
    for key, values in described.axes.items():
        screen.print(f"each with {key} = {', '.join(map(str, values))}", highlight=False)
    questions = Table.grid(padding=(0, 1))  # a long question wraps below itself
    for number, asked in enumerate(described.comparisons, 1):
        sides = f"{asked.treatment} against {asked.control}"
        questions.add_row(f"{number}.", styled(f"{asked.question} ", (f"({sides})", "dim")))
    if questions.row_count:
        screen.print(questions, highlight=False)
    if not described.comparisons:
        screen.print("no comparisons: the report will show the arms side by side and say nothing", highlight=False)


def _as_line(change: dict[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(change, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return text[1:-1] or "-"


def _print_runs(screen: "Console", found: "Sequence[PlannedRun]", finished: "Sequence[PlannedRun]") -> None:
    from rich.table import Table

    title = f"{found[0].suite}: {counted(len(found), 'run')}, {len(finished)} finished"
    table = Table(title=title, title_justify="left")
    for name in ("arm", "seed", "run", "state"):
        table.add_column(name, justify="right" if name == "seed" else "left", overflow="fold")
    for run in found:
        table.add_row(run.arm, str(run.seed), run.run_id, "finished" if run in finished else "to do")
    screen.print(table)


def _row(run: "PlannedRun", finished: bool) -> dict[str, object]:
    return {
        "suite": run.suite,
        "arm": run.arm,
        "seed": run.seed,
        "run_id": run.run_id,
        "spec_digest": run.spec_digest,
        "finished": finished,
    }
