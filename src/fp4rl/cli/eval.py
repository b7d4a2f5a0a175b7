"""`fp4rl eval`: evaluate a model folder, or a run's policy, on a task, at named precisions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.described import is_spec, require_here
from fp4rl.cli.eval_source import Source, asked_task, cut_from, described, source_of, with_task
from fp4rl.cli.eval_view import (
    as_rows,
    differences,
    differences_table,
    notes,
    samples_table,
    saved_in,
    shares_table,
    write_items,
)
from fp4rl.cli.injections import Injections
from fp4rl.cli.options import AsJson, Deployed, FormerPreset, RunsRoot, asked_deployment, require_writable
from fp4rl.cli.packed_start import say_packed
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round
from fp4rl.lab.matrix import single
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment

if TYPE_CHECKING:
    from fp4rl.rl.answered import Evaluation as Measured
    from fp4rl.rl.evaluate import EvaluationRunner

Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision",
        "-p",
        help="full, a mode (w4a8), a format (mxfp8), matmul_noise=0.05, stored (a packed folder as it is served), or a "
        "YAML file with an injection, also as NAME=FILE; may be repeated.",
    ),
]


Judged = Annotated[
    Path,
    typer.Argument(help="A model folder, an adapter or a packed one; a run (suite/run-id), or a checkpoint of one."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="arithmetic (the default), gsm8k with --data, or another of `fp4rl keys task.name`; a run's own. Or a "
        "suite's file, with its task and limits of answers; or keys, such as 'name=table path=FILE'."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="The task's file, such as GSM8K's; a tenth of it is held out and answered, see --split."),
]
TestPath = Annotated[Path | None, typer.Option(help="A test file instead of --data; all of it is answered.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of an answer; by default the run's or the task's (arithmetic: 48), else 1024."),
]
Stops = Annotated[
    list[str] | None,
    typer.Option(help="A text that ends an answer; may be repeated, '' for none. The default is the task's own."),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Answers a problem: 1 is greedy, more are sampled (pass@k, maj@k).")
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Add matmul noise of 0 to 10 %, and BF16, MXFP8, NVFP4 and MXFP4 weights.")
]
Dtype = Annotated[
    str | None, typer.Option(help="The dtype that the model is loaded in; by default the run's, else float32.")
]


def command(
    model: Judged,
    task: TaskName = None,
    data: Data = None,
    test_path: TestPath = None,
    split: Annotated[str | None, typer.Option(help="test (the default) or validation: which tenth of --data.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Solved problems before each; not of every task.")] = None,
    precision: Precisions = None,
    injection: Injections = None,
    deployment: Deployed = None,
    count: Annotated[int | None, typer.Option(min=1, help="Number of problems; by default all, up to 500.")] = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stops = None,
    samples: Samples = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampled answers; 1 by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampled answers; 0 by default.")] = None,
    sweep: Sweep = False,
    dtype: Dtype = None,
    out: Annotated[Path | None, typer.Option(help="Write one row per answer to this .parquet or .jsonl file.")] = None,
    runs: RunsRoot = Path("runs"),
    preset: FormerPreset = None,
    as_json: AsJson = False,
) -> None:
    """Answer the task's test problems and print strict, flexible and format rates with 95 % intervals.

    A run is judged by its own description: its task, its limits, its profiles and, as `deployment`, its injection.
    Several precisions are compared with the first on the same problems.

    Beside accuracy stands the KL between the policy unrounded and at each precision, over the answers that it gave: two
    forwards of every answer, which cost far less than writing it did.

    Examples: `fp4rl eval quickstart/w4a8-s0 -p full -p deployment -p matmul_noise=0.05`,
    `fp4rl eval MODEL --injection "mode=w4a4 deployment=compressed_tensors" --injection advice.yaml`
    """
    require_writable(out, "--out", new=True)
    given: dict[str, Any] = {
        "deployment": asked_deployment(deployment, preset),
        "samples": samples,
        "temperature": temperature,
        "seed": seed,
        "split": split,
        "count": count,
    }
    given |= {"max_new_tokens": max_new_tokens, "stop": [text for text in stop if text] if stop else None}
    source = source_of(model, runs)
    if task is not None and (is_spec(task) or "=" in task):
        source, task = with_task(source, task), None
    asked_for = asked_task(source.own.get("task") or {}, task, {"data": data, "test_path": test_path}, split, few_shot)
    experiment = described(source, dtype, asked_for, precision or [], sweep, given, injection or [])
    if experiment.evaluation.samples == 1 and (temperature is not None or seed is not None):
        raise InvalidValueError("--temperature and --seed draw several answers; one is greedy: add --samples 4")
    runner, evaluations = _evaluated(experiment, source, count)
    if out is not None:
        write_items(out, evaluations)
    if as_json:
        print_json(as_rows(evaluations))
        return
    _print(runner, evaluations, source, cut_from(source, data, test_path, runner.spec.split))


def _print(runner: "EvaluationRunner", evaluations: "list[Measured]", source: Source, problems: str | None) -> None:
    screen, summaries = console(), [evaluation.summary() for evaluation in evaluations]
    screen.print(shares_table(source.name or str(source.folder), summaries, problems))
    if (several := samples_table(summaries)) is not None:
        screen.print(several)
    if len(evaluations) > 1:
        screen.print(differences_table(summaries[0].profile.name, differences(evaluations)))
    for line in notes(runner, saved_in(source.folder) or "bfloat16", is_packed=say_packed(source.folder)):
        screen.print(line)
    engine = (source.own.get("rollout") or {}).get("engine", "transformers")
    if engine != "transformers":
        screen.print(f"answers are by transformers here, those of the run's own evaluations by {engine}")


def _evaluated(experiment: Experiment, source: Source, count: int | None) -> "tuple[EvaluationRunner, list[Measured]]":
    """Evaluate the model at every precision, in order, with a progress bar on stderr."""
    require_here([single(experiment, "eval")])
    quiet()  # torch, which takes seconds to import, is imported below: all errors above are found without it
    from fp4rl.rl.evaluate import EvaluationRunner

    say_packed(source.folder)
    ready_to_round()
    model, spec = experiment.model, experiment.evaluation.for_task(experiment.task)
    problems = experiment.task.problems(spec.split, count)[: spec.count]
    experts = model.experts_implementation
    runner = EvaluationRunner(spec, experiment.injection, experiment.task, problems, experts=experts)
    with progress() as advance:
        return runner, list(runner.run(source.folder, model.dtype, 0, True, advance))
