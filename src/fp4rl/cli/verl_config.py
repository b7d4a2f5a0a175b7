"""`fp4rl verl-config`: write one run of a description for verl, or read a script of verl as a description."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from fp4rl.cli.described import described_by, require_here, runs_described
from fp4rl.cli.options import AsJson, AtScale, Overrides, require_writable, write_fragment
from fp4rl.cli.terminal import console, print_json, say_once, styled
from fp4rl.lab.catalogue.rows import Scale
from fp4rl.lab.matrix import PlannedRun
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

if TYPE_CHECKING:
    from fp4rl.engines.verl.machines import Machine
    from fp4rl.engines.verl.script import VerlRun


def command(
    spec: Annotated[Path | None, typer.Argument(help="YAML file of a suite or of one experiment.")] = None,
    overrides: Overrides = None,
    *,
    scale: AtScale = None,
    arm: Annotated[str | None, typer.Option("--arm", help="Arm of a suite; needed where it has several.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="One of a suite's seeds; by default its first.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="For NVIDIA GPUs: vLLM, FSDP2 (the default).")] = False,
    npu: Annotated[bool, typer.Option("--npu", help="For Ascend NPUs: vLLM-Ascend, FSDP2.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a CPU: a trial with fp4rl's own sampler.")] = False,
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Devices; the spec's processes, else 8 (CPU: 2).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write a script and its files; with --from, YAML.")] = None,
    old: Annotated[
        Path | None, typer.Option("--from", help="Read a script or YAML of verl, and print it as a description.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what verl is asked for to run an experiment: every Hydra override, and what differs there.

    Examples: `fp4rl verl-config mine.yaml --arm w4a8 --npu --out w4a8.sh`, `fp4rl verl-config --from old.sh`
    """
    if old is not None:
        if spec is not None or arm is not None or seed is not None or devices is not None or gpu or npu or cpu:
            raise InvalidValueError("--from reads a script of verl and takes --out and --json alone; drop the others")
        _from(old, out, as_json=as_json)
        return
    if spec is None:
        raise InvalidValueError("name the spec of a suite or experiment, or --from a script of verl")
    from fp4rl.engines.verl.configuration import Files
    from fp4rl.engines.verl.script import for_verl, verl_run, write_run

    quiet()
    require_writable(out, "--out")
    planned = _run(spec, overrides or [], scale, arm, seed)
    run = for_verl(planned)
    files = Files(out or Path(f"{run.run_id}.sh"))
    if out is not None:
        require_here([run])
    request = verl_run(run, _machine(gpu=gpu, npu=npu, cpu=cpu), devices, files)
    written = write_run(request, files) if out is not None else ()
    if as_json:
        print_json(_facts(request, written))
        return
    if run != planned:
        say_once(
            [f"engine: verl is written into the experiment; write it into {spec} as well, so that both have one id"]
        )
    for line in request.differences:
        console(stderr=True).print(styled(("in verl", "yellow"), f": {line}"))
    if out is None:
        sys.stdout.write(request.script())
        console(stderr=True).print("nothing is written; --out FILE.sh writes it with its data and experiment")
        return
    for file in written:
        console().print(str(file), soft_wrap=True)
    console().print(f"run it where verl is installed: bash {out}", soft_wrap=True)


def _run(spec: Path, overrides: list[str], scale: Scale | None, arm: str | None, seed: int | None) -> PlannedRun:
    """Return the run of an arm and a seed."""
    runs = runs_described(described_by(spec, overrides, scale), spec.stem)
    arms, seeds = (list(dict.fromkeys(of)) for of in ((run.arm for run in runs), (str(run.seed) for run in runs)))
    if arm is None and len(arms) > 1:
        raise InvalidValueError(f"{spec} has several arms, and a run of verl is one; name --arm: {', '.join(arms)}")
    arm = arms[0] if arm is None else arm
    if arm not in arms:
        raise NotFoundError(f"{spec} has no arm {arm!r}{nearest(arm, arms)}")
    chosen = seeds[0] if seed is None else str(seed)
    if chosen not in seeds:
        raise NotFoundError(
            f"{spec} has the seeds {', '.join(seeds)}, not {chosen}; seeds=[{chosen}] adds it to a suite"
        )
    return next(run for run in runs if run.arm == arm and str(run.seed) == chosen)


def _machine(*, gpu: bool, npu: bool, cpu: bool) -> "Machine":
    from fp4rl.engines.verl.machines import CPU, GPU, NPU

    if gpu + npu + cpu > 1:
        raise InvalidValueError("--gpu, --npu and --cpu: a script is for one kind of machine; take one")
    return NPU if npu else CPU if cpu else GPU


def _facts(request: "VerlRun", written: Sequence[Path]) -> dict[str, Any]:
    run = request.run
    return {
        **{name: getattr(run, name) for name in ("suite", "arm", "seed", "run_id")},
        "machine": request.machine.name,
        "configuration": request.configuration,
        "overrides": list(request.overrides),
        "environment": request.variables,
        "differences": list(request.differences),
        "files": [str(file) for file in written],
    }


def _from(file: Path, out: Path | None, *, as_json: bool) -> None:
    from fp4rl.engines.verl.old import is_recipe, recipe, rows_of, translate
    from fp4rl.engines.verl.old_files import settings_in

    require_writable(out, "--out")
    settings, variables = settings_in(file)
    added, traps = translate(settings, variables)
    parts, lost = recipe(settings, rows_of(settings)) if is_recipe(settings) else ({}, ())
    content, lines = parts | added, (*traps, *lost)
    if not content:
        raise InvalidValueError(
            f"{file}: holds no setting of verl that a description has; name a script or YAML of verl"
        )
    if as_json:
        print_json({"spec": content, "warnings": list(lines)})
        return
    for line in lines:
        console(stderr=True).print(styled(("warning", "yellow"), f": {line}"))
    if out is None:
        sys.stdout.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return
    write_fragment(out, (f"{file.name} of verl, read by `fp4rl verl-config --from`", *lines), content)
    console().print(f"{out}: `fp4rl plan {out}` shows what it describes", soft_wrap=True)
