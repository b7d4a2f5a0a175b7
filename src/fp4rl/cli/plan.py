"""`fp4rl plan`: print what a file describes (arms, questions, runs with their ids) and which runs are done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from fp4rl.cli.budgets_view import print_missing
from fp4rl.cli.described import described_by, own_code, require_here, runs_described, warnings_of
from fp4rl.cli.ledger import ledger_address
from fp4rl.cli.options import Address, AsJson, AtScale, Jobs, Overrides, RunsRoot, SpecFile, require_writable
from fp4rl.cli.precision_view import precision_stages, print_precision
from fp4rl.cli.prompt_view import has_template, print_prompts, prompts_of
from fp4rl.cli.prospect import print_expected, print_next, print_power
from fp4rl.cli.stages_view import budgets_of, print_stages
from fp4rl.cli.terminal import console, print_indented, print_json, styled, table
from fp4rl.engines.executors.slurm import script
from fp4rl.lab.compare.controls import missing_controls
from fp4rl.lab.estimates import lines as estimated
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.provenance import missing_files
from fp4rl.lab.runs import Run
from fp4rl.lab.serving import fates, served_as
from fp4rl.lab.status import Status
from fp4rl.lab.suites import statuses_of
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.model import Embedded
from fp4rl.spec.words import counted


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    scale: AtScale = None,
    next_steps: Annotated[
        bool, typer.Option("--next", help="Show in which bands a suite's numbers lie, and what comes next.")
    ] = False,
    runs: RunsRoot = Path("runs"),
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Show instead what the model sees of problem 1: text and token ids.")
    ] = False,
    jobs: Jobs = 2,
    slurm: Annotated[
        Path | None, typer.Option("--slurm", help="Write a job array for Slurm to this file: its index is the run.")
    ] = None,
    ledger: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print what a file describes: its arms, its questions, and its runs with their ids.

    Examples: `fp4rl plan catalogue/quickstart training.steps=10`, `fp4rl plan my_suite.yaml --show-prompt`,
    `fp4rl plan my_suite.yaml --slurm array.sh`
    """
    described = described_by(spec, overrides or [], scale)
    runs_planned = runs_described(described, spec.stem)
    if show_prompt:
        require_here(runs_planned)
        print_json([*prompts_of(runs_planned).values()]) if as_json else print_prompts(runs_planned)
        return
    if slurm is not None:
        words = [str(spec), *(overrides or []), *(["--scale", scale] if scale else []), "--runs", str(runs)]
        _write_array(slurm, runs_planned, words)
        return
    if next_steps:
        print_next(described, runs, as_json=as_json)
        return
    statuses = statuses_of(runs_planned, runs)
    if as_json:
        whole = budgets_of(runs_planned, runs)
        in_all = {arm: {"total_steps": budget and budget.steps} for arm, budget in whole.items()}
        print_json([_as_row(run, statuses[run.run_id]) | in_all[run.arm] for run in runs_planned])
        return
    screen = console()
    _print_what(runs_planned[0].experiment)
    _print_recipes(runs_planned)
    print_stages(runs_planned, runs)
    print_precision(runs_planned)
    screen.print(_what_interrupting_costs(runs_planned[0].experiment.training.save_freq))
    if isinstance(described, Suite):
        print_expected(described)
        _print_suite(described)
    _print_runs(runs_planned, statuses)
    _print_served({run.arm: run.experiment for run in runs_planned})
    missing = [run for run in runs_planned if not statuses[run.run_id].finished]
    for line in estimated(missing, earlier_runs(missing, runs, ledger), jobs):
        print_indented(line, by=0)
    if isinstance(described, Suite):
        print_power(described, runs_planned[0].experiment, ledger_address(runs, ledger))
        print_missing(missing_controls(described, runs))
    _print_remarks(runs_planned, described)


def _print_runs(runs: Sequence[PlannedRun], statuses: Mapping[str, Status]) -> None:
    finished = sum(statuses[run.run_id].finished for run in runs)
    title = f"{runs[0].suite}: {counted(len(runs), 'run')}, {finished} finished"
    rows = ((run.arm, str(run.seed), run.run_id, statuses[run.run_id].word) for run in runs)
    console().print(table("arm", "seed>", "run=", "status", rows=rows, title=title, lines=True))
    _print_reasons({run_id: status for run_id, status in statuses.items() if status.why})


def _write_array(file: Path, runs: Sequence[PlannedRun], words: Sequence[str]) -> None:
    require_writable(file, "--slurm")
    file.write_text(script(file, runs, words), encoding="utf-8")
    console().print(
        f"`bash {file}` submits its runs, and resumes what is not finished when called again", soft_wrap=True
    )


def _print_remarks(runs: Sequence[PlannedRun], described: Suite | Experiment) -> None:
    for line in own_code(runs):
        print_indented(("code", "yellow"), f": {line}")
    for line in warnings_of(runs, described):
        console().print(styled(("warning", "yellow"), f": {line}"))
    for line in missing_files(runs):
        console().print(styled(("missing", "yellow"), f": {line}"))


def earlier_runs(missing: Sequence[PlannedRun], runs: Path, ledger: str | None) -> list[Run]:
    """Return the runs of the ledger that are of the task and model of one that is missing; none without a ledger."""
    address = ledger_address(runs, ledger)
    if not missing or (isinstance(address, Path) and not address.is_file()):
        return []
    from fp4rl.lab.ledger.query import runs_on  # and with it SQL, which a plan without earlier runs does not need
    from fp4rl.lab.ledger.store import open_ledger

    specs = [run.experiment.model_dump(mode="json") for run in missing]
    kinds = {(digest(spec["task"]), digest(spec["model"])) for spec in specs}
    with open_ledger(address) as book, book.reading() as connection:
        return runs_on(connection, kinds)


def _as_row(run: PlannedRun, status: Status) -> dict[str, Any]:
    names = ("suite", "arm", "seed", "run_id", "spec_digest", "needs")
    state: dict[str, Any] = {
        "finished": status.finished,
        **status.as_dict(),
        "served_as": served_as(run.experiment.injection),
    }
    if stages := precision_stages(run):
        state["precision"] = [dict(zip(("point", "steps", "computed_in"), stage, strict=True)) for stage in stages]
    return {name: getattr(run, name) for name in names} | state


def _print_reasons(statuses: Mapping[str, Status]) -> None:
    for run_id, status in statuses.items():
        print_indented((run_id, "bold"), f" {status.word}: {status.why}")


def _print_what(experiment: Experiment) -> None:
    """Print what the first run trains; the arms show in which keys the others differ."""
    recipe, model = experiment.training, experiment.model
    source = model.path or f"{model.embedded_word} ({(model.embedded or Embedded()).hidden_size} wide)"
    source += "".join(f", {transform.name}" for transform in model.transforms)
    console().print(
        f"{recipe.algorithm} on {experiment.task.name}, {counted(recipe.steps, 'step')} of {recipe.train_batch_size} x "
        f"{counted(recipe.rollout_n, 'answer')}, from {source}; "
        f"evaluated on {counted(experiment.evaluation.count, 'problem')}"
    )
    if model.path is not None and getattr(experiment.task, "chat", False) and has_template(Path(model.path)):
        console().print("prompts: by the folder's chat template; --show-prompt shows what the model sees of problem 1")


def _print_recipes(runs: Sequence[PlannedRun]) -> None:
    """Print all numbers of the recipes, the algorithm's defaults included, once for all arms that share them."""
    recipes: dict[str, dict[str, None]] = {}
    for run in runs:
        recipe = run.experiment.training
        numbers = "; ".join(f"{key} {value}" for key, value in recipe.effective().items())
        recipes.setdefault(f"{recipe.algorithm} ({recipe.published.source}): {numbers}", {})[run.arm] = None
    for recipe_in_words, arms in recipes.items():
        of = f" of {', '.join(arms)}" if len(recipes) > 1 else ""
        console().print(f"recipe{of}: {recipe_in_words}")


def _print_served(arms: Mapping[str, Experiment]) -> None:
    """Print what is served of each arm, once for all that share it, and each note on that once."""
    served = fates(arms)
    rows = (
        (", ".join(names), fate.deployment, fate.checkpoint, styled((fate.computed, "yellow" if fate.changed else "")))
        for fate, names in served.items()
    )
    title = "what is served: the deployment decides, not the checkpoint"
    console().print(table("arms", "deployment=", "checkpoint=", "computed as=", rows=rows, title=title))
    for note in dict.fromkeys(fate.note for fate in served if fate.note):
        print_indented(note)


def _what_interrupting_costs(save_freq: int) -> str:
    every = f"{counted(save_freq, 'step')} or 5 minutes, whichever are less" if save_freq else "5 minutes"
    return (
        "Ctrl-C: each run ends after the step it is in, and the same command goes on from there; a kill or a power cut "
        f"costs at most {every} (more where writing a checkpoint takes long)"
    )


def _print_suite(suite: Suite) -> None:
    screen = console()
    arms = ((name, _as_line(change)) for name, change in suite.arms.items())
    screen.print(table("arm", "differs from the base in", rows=arms, title="arms", lines=True))
    for key, values in suite.axes.items():
        screen.print(f"each with {key} = {', '.join(map(str, values))}")
    questions = Table.grid(padding=(0, 1))  # a long question wraps within its column
    for number, question in enumerate(suite.comparisons, 1):
        sides = f"{question.treatment} against {question.control}"
        questions.add_row(f"{number}.", styled(f"{question.question} ", (f"({sides})", "dim")))
    if suite.comparisons:
        screen.print(questions)
    else:
        screen.print("no comparisons: the report will show the arms side by side and say nothing")


def _as_line(change: dict[str, Any]) -> str:
    text = yaml.safe_dump(change, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return text[1:-1] or "-"
