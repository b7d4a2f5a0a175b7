"""`fp4rl deployments`: who packs the weights, which kernel rounds the inputs, and what a checkpoint is served as."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fp4rl.cli.options import AsJson, asked_deployment
from fp4rl.cli.terminal import console, print_indented, print_json, styled, table
from fp4rl.spec.deployment import DEPLOYMENTS, Deployment, deployment_named
from fp4rl.spec.errors import NotFoundError, nearest, shown
from fp4rl.spec.kernels import SERVED_MODES, Kernel
from fp4rl.spec.packers import Packer, Rules


def command(
    name: Annotated[str | None, typer.Argument(help="A deployment, to see what it serves each mode as.")] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="Only what a checkpoint of this mode is served as.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the deployments, each a packer of weights times a kernel, and what a checkpoint is really computed as.

    Examples: `fp4rl deployments`, `fp4rl deployments vllm_ascend`, `fp4rl deployments --mode w4a8`
    """
    if mode is not None and mode not in SERVED_MODES:
        raise NotFoundError(f"--mode {shown(mode)}: no checkpoint has this mode{nearest(mode, SERVED_MODES)}")
    named = deployment_named(asked_deployment(name, None) or name) if name else None
    chosen, modes = (named,) if named else tuple(DEPLOYMENTS.values()), (mode,) if mode else SERVED_MODES
    if as_json:
        facts = [_facts(deployment, modes) for deployment in chosen]
        print_json(facts[0] if named else facts)
    elif named:
        _show(named, modes)
    elif mode:
        _compare(chosen, mode)
    else:
        _list(chosen)


def _list(chosen: Iterable[Deployment]) -> None:
    screen = console()
    names = ((each.name, each.packer.name, each.kernel.name) for each in chosen)
    screen.print(table("deployment", "packer of weights", "kernel", rows=names))
    screen.print(styled(("\nPackers", "bold"), ": scale rule and rounding of weights, and how that is known"))
    for packer in {each.packer.name: each.packer for each in chosen}.values():
        screen.print(styled((packer.name, "bold")))
        _print_rules(packer.weights, packer)
    screen.print(styled(("\nKernels", "bold"), ": scale rule and rounding of the inputs of matmuls"))
    for kernel in {each.kernel.name: each.kernel for each in chosen}.values():
        screen.print(styled((kernel.name, "bold"), f": {kernel.hardware}"))
        _print_rules(kernel.inputs, kernel)
    screen.print("\nWhat each mode is computed as: `fp4rl deployments NAME`, `fp4rl deployments --mode w4a8`.")


def _print_rules(rules: Rules | None, source: Packer | Kernel) -> None:
    print_indented(str(rules) if rules else "not rounded")
    print_indented((f"{source.checked}: {source.source}", "dim"))


def _show(deployment: Deployment, modes: Iterable[str]) -> None:
    screen, packer, kernel = console(), deployment.packer, deployment.kernel
    screen.print(styled((deployment.name, "bold"), f": {packer.name} packs, {kernel.name} computes"))
    screen.print(f"weights: {packer.weights}; scales computed in {packer.dtype} dtype")
    print_indented((f"{packer.checked}: {packer.source}", "dim"))
    screen.print(f"inputs: {kernel.inputs or 'not rounded'}")
    print_indented((f"{kernel.checked}: {kernel.source}", "dim"))
    screen.print(f"hardware: {kernel.hardware}")
    if deployment.note:
        screen.print(f"note: {deployment.note}")
    screen.print("", table("checkpoint=", "computed as=", "", rows=_served(deployment, modes)), sep="\n")


def _served(deployment: Deployment, modes: Iterable[str]) -> Iterator[tuple[Any, ...]]:
    for mode in modes:
        served = deployment.served(mode)
        what = "not looked up" if served is None else served.mode or "nothing"
        yield mode, styled((what, "yellow" if deployment.changes(mode) else "")), served.note if served else ""


def _compare(chosen: Iterable[Deployment], mode: str) -> None:
    rows = ((each.name, *row[1:]) for each in chosen for row in _served(each, (mode,)))
    console().print(table("deployment=", "computed as=", "", rows=rows, title=f"What a {mode} checkpoint is served as"))


def _facts(deployment: Deployment, modes: Iterable[str]) -> dict[str, Any]:
    packer, kernel = deployment.packer, deployment.kernel
    known = {"checked", "source", "name"}
    return {
        "name": deployment.name,
        "packer": {key: value for key, value in asdict(packer).items() if key in known}
        | {"dtype": packer.dtype, "weights": asdict(packer.weights)},
        "kernel": {key: value for key, value in vars(kernel).items() if key in known}
        | {"hardware": kernel.hardware, "inputs": asdict(kernel.inputs) if kernel.inputs else None},
        "beside_experts": deployment.beside_experts.name if deployment.beside_experts else None,
        "note": deployment.note,
        "serves": {
            mode: {"mode": served.mode, "note": served.note, "changed": deployment.changes(mode)}
            for mode in modes
            if (served := deployment.served(mode)) is not None
        },
    }
