"""`fp4rl export`: write a policy as a packed checkpoint, or with its rounding baked in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.packed_start import or_embedded
from fp4rl.cli.terminal import console, print_json, progress, ready_to_round, styled
from fp4rl.models.quiet import quiet
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.engines.checkpoints.exported import Exported

_MIB = 1 << 20


def command(
    source: Annotated[
        str,
        typer.Argument(help="A run (suite/run-id or its folder), a Hugging Face model folder, or the word `embedded`."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write, which is not there yet.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="injection.key=value, or +file.yaml as `scan` writes with --calibrate, --advise."
        ),
    ] = None,
    *,
    to: Annotated[str, typer.Option("--to", help="compressed_tensors, ascend_v1, modelopt or bf16.")],
    mode: Annotated[
        str | None, typer.Option("--mode", help="A mode such as w4a4; a run's own, else w4a8 (bf16: w4a16).")
    ] = None,
    deployment: Annotated[
        str | None, typer.Option("--deployment", help="Whose rules weights are rounded by (`fp4rl deployments`).")
    ] = None,
    override: Annotated[
        bool, typer.Option("--anyway", help="Write also what was not evaluated so, or is not served; the card says so.")
    ] = False,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write the weights exactly as they were rounded in training, packed for an engine, with a model card.

    Examples: `fp4rl export quickstart/w4a8-s0 OUT --to compressed_tensors`, `fp4rl export MODEL OUT --to ascend_v1`
    """
    quiet()
    from fp4rl.engines.checkpoints.export import export
    from fp4rl.engines.checkpoints.layouts.all import layout_named
    from fp4rl.engines.checkpoints.source import source_of

    layout = layout_named(to)
    meant = source_of(or_embedded(source, runs), runs, mode, deployment, layout, changes or ())
    ready_to_round()
    with progress() as advance:
        exported = export(
            meant, layout, out, override=override, said=lambda done, of: advance("MiB", done // _MIB, of // _MIB)
        )
    if as_json:
        print_json(_facts(exported))
        return
    _show(exported)


def _show(exported: "Exported") -> None:
    screen, rounded = console(), exported.policy.rounded
    files = counted(len(exported.stored.files), "file")
    screen.print(styled((str(exported.folder), "bold"), f": {exported.layout.name}, {files}"))
    screen.print(
        f"{counted(len(rounded), 'weight')} of {exported.bits:.2f} bits a value, {exported.stored.bytes / _MIB:.1f} MiB"
    )
    screen.print(f"served: {exported.layout.served(exported.policy)}")
    for line in exported.layout.notes(exported.policy):
        screen.print(f"note: {line}")
    for line in exported.overridden:
        screen.print(styled(("written all the same", "yellow"), f": {line}"))
    screen.print(
        f"`fp4rl verify {exported.folder}` compares it, value by value, with what it was made from", soft_wrap=True
    )


def _facts(exported: "Exported") -> dict[str, Any]:
    return {
        "folder": str(exported.folder),
        "layout": exported.layout.name,
        "source": exported.source.name,
        "mode": exported.policy.injection.checkpoint_mode,
        "deployment": exported.policy.injection.deployment,
        "served_as": exported.layout.served(exported.policy),
        "notes": list(exported.layout.notes(exported.policy)),
        "rounded": len(exported.policy.rounded),
        "bits": exported.bits,
        "bytes": exported.stored.bytes,
        "files": list(exported.stored.files),
        "overridden": list(exported.overridden),
    }
