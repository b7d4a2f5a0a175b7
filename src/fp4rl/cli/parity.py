"""`fp4rl parity`: audit the engine that samples against the model that is trained, by value."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4rl.cli.described import is_spec, require_here, run_described
from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_indented, print_json, progress, ready_to_round, styled
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

_CHECKS = 4


def command(
    source: Annotated[str, typer.Argument(help="A run, a spec file (with --arm), or a Hugging Face model folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, where a spec file is named.")] = None,
    engine: Annotated[str, typer.Option("--engine", help="transformers or vllm.")] = "transformers",
    arm: Annotated[str | None, typer.Option("--arm", help="Of a suite; its first that rounds something else.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="Of a model folder: what it is audited under.")] = None,
    deployment: Annotated[
        str | None, typer.Option("--deployment", help="Tell what the rules of its kernel would change besides.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Number of prompts.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 48,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare an engine's weights, its scores of the same tokens and their order with the trainer's own model.

    Examples: `fp4rl parity quickstart/w4a4-s0`, `fp4rl parity suite.yaml --engine vllm --deployment vllm_blackwell`
    """
    quiet()
    folder, experiment = _policy(source, overrides or [], arm, mode, runs)
    import torch

    from fp4rl.engines.parity.audit import audit
    from fp4rl.engines.parity.engines import engine_named
    from fp4rl.models.load import load
    from fp4rl.rl.inputs import start_folder
    from fp4rl.rl.prompts import encoded

    chosen = engine_named(engine)
    ready_to_round()
    results = []
    with progress() as advance, torch.random.fork_rng():
        start = folder or start_folder(experiment.model, experiment.task, runs / "models")
        model, tokenizer = load(start, experiment.model.dtype, experiment.model.experts_implementation)
        prompts = encoded(model, tokenizer, experiment.task.problems("test", count)[:count])
        for check in audit(chosen, model, tokenizer, experiment.injection, prompts, max_new_tokens, deployment):
            results.append(check)
            advance("checks", len(results), _CHECKS)
    if as_json:
        print_json({"engine": engine, "checks": [asdict(check) for check in results]})
    else:
        _show(engine, results)
    failed = [check.name for check in results if check.passed is False]
    if failed:
        raise CheckFailed(f"{engine} is another policy than the one that is trained: {' and '.join(failed)} differ")


def _policy(
    source: str, overrides: list[str], arm: str | None, mode: str | None, runs: Path
) -> tuple[Path | None, Experiment]:
    """Return the folder that is named (None for the start of a spec), and what it is audited as."""
    if is_spec(source):
        planned = run_described(source, overrides, arm)
        require_here([planned])
        return None, planned.experiment
    if overrides or arm:
        raise InvalidValueError(f"{source} is no spec file, so key=value and --arm have nothing to change; use --mode")
    from fp4rl.engines.checkpoints.source import dtype_of, policy_of

    folder, run = policy_of(source, runs)
    if run is not None:
        experiment = Experiment.model_validate(dict(run.spec))
    else:
        dtype = dtype_of(folder) or "float32"
        experiment = Experiment.model_validate({"model": {"path": str(folder), "dtype": dtype}})
    return folder, experiment if mode is None else experiment.model_copy(update={"injection": Injection.named(mode)})


def _show(engine: str, results: list[Any]) -> None:
    from fp4rl.engines.parity.causes import causes_of

    marks = {True: ("equal ", "green"), False: ("DIFFER", "red"), None: ("told  ", "yellow")}
    for check in results:
        console().print(styled(marks[check.passed], (f" {check.name}", "bold")))
        print_indented(check.seen, by=7)
        for cause in causes_of(check.name) if check.passed is False else ():
            print_indented((f"cause: {cause.what}", "bold"), by=7)
            print_indented(f"shows: {cause.shows}", by=9)
            print_indented(f"mended: {cause.mended}", by=9)
    if engine == "transformers":
        console().print("transformers is the trainer's own model: its weights are probed layer by layer")
