"""`fp4rl parity`: audit the engine that samples against the model that is trained, by value."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4rl.cli.described import is_spec, require_here, run_described
from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.packed_start import say_packed, start_of
from fp4rl.cli.terminal import console, print_indented, print_json, progress, ready_to_round, say_once, styled
from fp4rl.lab.stages import at_start
from fp4rl.models.quiet import quiet
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse
from fp4rl.spec.model import EMBEDDED
from fp4rl.spec.retarget import under_deployment
from fp4rl.spec.rollout import RolloutEngine


def command(
    source: Annotated[
        str,
        typer.Argument(help="A run, a spec file (with --arm), a Hugging Face model folder, or the word `embedded`."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, where a spec file is named.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="transformers or vllm; by default what SOURCE samples with.")
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="Of vllm: the address of a running server, http://HOST:PORT.")
    ] = None,
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

    Examples: `fp4rl parity quickstart/w4a4-s0`, `fp4rl parity suite.yaml --engine vllm --deployment vllm_blackwell`,
    `fp4rl parity embedded --mode w4a8 --server http://127.0.0.1:8000`
    """
    quiet()
    folder, experiment = _policy(source, overrides or [], arm, mode, runs)
    chosen = _engine(engine, server, experiment.rollout)
    if deployment is not None:
        _require_rules(experiment.injection, deployment)
    name, results = _audited(chosen, folder, experiment, (count, max_new_tokens), deployment, runs)
    if as_json:
        print_json({"engine": chosen.engine, "server": chosen.server, "checks": [asdict(check) for check in results]})
    else:
        _show(chosen.engine, results)
    failed = [check.name for check in results if check.passed is False]
    if failed:
        raise CheckFailed(f"{name} is another policy than the one that is trained: {' and '.join(failed)} differ")


def _audited(
    chosen: RolloutEngine,
    folder: Path | None,
    experiment: Experiment,
    sizes: tuple[int, int],
    deployment: str | None,
    runs: Path,
) -> tuple[str, list[Any]]:
    """Return the engine's name and its checks; `sizes`: prompts, and tokens of an answer."""
    import torch

    from fp4rl.engines.parity.audit import audit
    from fp4rl.engines.parity.engines import engine_of
    from fp4rl.rl.prompts import encoded
    from fp4rl.rl.verify import load_saved

    engine, spec = engine_of(chosen, experiment.model.dtype), experiment.model
    ready_to_round()
    start = folder or start_of(spec, experiment.task, runs)
    _say_packed(start, chosen)
    count, tokens = sizes
    with torch.random.fork_rng(), progress() as advance:
        model, tokenizer = load_saved(start, spec.dtype, spec.lora, spec.experts_implementation)
        prompts = encoded(model, tokenizer, experiment.task.problems("test", count)[:count])
        said = partial(advance, "audit")
        checks = audit(engine, model, tokenizer, experiment.injection, prompts, tokens, deployment, said)
        return engine.name, list(checks)


def _engine(engine: str | None, server: str | None, own: RolloutEngine) -> RolloutEngine:
    """Return the engine that the options name, else the one that the audited experiment samples with."""
    named = {"engine": engine or ("vllm" if server else own.engine)}
    kept = own.model_dump(exclude_none=True) if named["engine"] == own.engine else {}
    return parse(
        RolloutEngine, {**kept, **named, **({"server": server} if server else {})}, "--server" if server else "--engine"
    )


def _require_rules(injection: Injection | None, deployment: str) -> None:
    """Raise NotFoundError for an unknown deployment, InvalidValueError where nothing is rounded under its rules."""
    if injection is None:
        deployment_named(deployment)
        raise InvalidValueError(
            f"--deployment {deployment}: nothing is rounded, so its rules change nothing; add --mode"
        )
    under_deployment(injection, deployment)


def _say_packed(start: Path, chosen: RolloutEngine) -> None:
    """Say that a folder is packed; InvalidValueError where vLLM would load it as it is packed."""
    if not say_packed(start):
        return
    if chosen.engine == "vllm" and chosen.server is None:
        raise InvalidValueError(
            f"{start} is packed, and vLLM would hold it packed while the trainer holds its decoded values; `fp4rl "
            "verify FOLDER --engine vllm` compares the two, and a server of an unpacked folder takes decoded values"
        )
    say_once(["what is audited are the decoded values; `fp4rl verify` compares what the folder itself holds"])


def _policy(
    source: str, overrides: list[str], arm: str | None, mode: str | None, runs: Path
) -> tuple[Path | None, Experiment]:
    """Return the folder that is named (None for the start of a spec), and what it is audited as."""
    if is_spec(source):
        planned = run_described(source, overrides, arm)
        require_here([planned])
        return None, at_start(planned, runs)
    if overrides or arm:
        raise InvalidValueError(f"{source} is no spec file, so key=value and --arm have nothing to change; use --mode")
    from fp4rl.engines.checkpoints.source import dtype_of, policy_of

    folder, run = (None, None) if source in EMBEDDED else policy_of(source, runs)
    if run is not None:
        experiment = Experiment.model_validate(dict(run.spec))
    elif folder is not None:
        dtype = dtype_of(folder) or "float32"
        experiment = Experiment.model_validate({"model": {"path": str(folder), "dtype": dtype}})
    else:
        experiment = Experiment.model_validate({"model": source})
    return folder, experiment if mode is None else experiment.model_copy(update={"injection": Injection.named(mode)})


def _show(engine: str, results: list[Any]) -> None:
    from fp4rl.engines.parity.causes import causes_of

    marks = {True: ("equal ", "green"), False: ("DIFFER", "red"), None: ("told  ", "yellow")}
    for check in results:
        console().print(styled(marks[check.passed], (f" {check.name}", "bold")))
        print_indented(check.seen, by=7)
        for cause in causes_of(check.name, check.tensors) if check.passed is False else ():
            print_indented((f"cause: {cause.what}", "bold"), by=7)
            print_indented(f"shows: {cause.shows}", by=9)
            print_indented(f"mended: {cause.mended}", by=9)
    if engine == "transformers":
        console().print("transformers is the trainer's own model: its weights are probed layer by layer")
