"""`fp4rl verify`: compare a checkpoint, value by value, with the policy that was trained."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.packed_start import or_embedded
from fp4rl.cli.terminal import console, print_indented, print_json, progress, ready_to_round
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, nearest
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.engines.checkpoints.verify.findings import Check, Verified

_ENGINES = ("transformers", "vllm")
_ALIKE = 5  # differences of one kind that are shown
# What sets two differences of one kind apart: numbers, names of tensors and files, whatever is quoted.
_NUMBERS = re.compile(r"'[^']*'|[\w./-]*[\d._/][\w./-]*|\d+")


def command(
    out: Annotated[Path, typer.Argument(help="A folder that `fp4rl export` or another packer wrote.")],
    against: Annotated[
        str | None, typer.Option("--against", help="A run, a model folder or `embedded`; what the export recorded.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="transformers or vllm: also let it load OUT, and compare what it computes."),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="What it should hold, such as w4a4; by default what was recorded.")
    ] = None,
    deployment: Annotated[
        str | None, typer.Option("--deployment", help="Whose rules rounded the weights (`fp4rl deployments`).")
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare every value of a checkpoint with the policy that was trained; exit code 1, naming all, where one differs.

    Examples: `fp4rl verify OUT`, `fp4rl verify OUT --engine transformers`, `fp4rl verify OTHERS --against MODEL`
    """
    if engine is not None and engine not in _ENGINES:
        raise NotFoundError(f"--engine {engine}: no such engine{nearest(engine, _ENGINES)}")
    quiet()
    from fp4rl.engines.checkpoints.verify.against import Request
    from fp4rl.engines.checkpoints.verify.verify import verify

    ready_to_round()
    named = against and or_embedded(against, runs)
    with progress() as advance:
        verified = verify(out, Request(named, runs, mode, deployment), advance, engine=engine)
    if as_json:
        print_json(verified.as_json())
    else:
        _show(verified)
    if verified.nothing_compared:
        raise InvalidValueError(f"{out}: no value was compared; name its run or model folder with --against")
    if verified.differences:
        which = ", ".join(check.name for check in verified.checks if check.differences)
        raise CheckFailed(f"{out}: {counted(len(verified.differences), 'difference')} ({which})")


def _show(verified: "Verified") -> None:
    screen = console()
    screen.print(f"{verified.folder}: {verified.layout}, against {verified.against or 'nothing'}")
    width = max(len(check.name) for check in verified.checks)
    for check in verified.checks:
        screen.print(f"{check.name:{width}}  {_counts(check)}")
        for line in _lines(check):
            print_indented((line, "red"))
        for note in check.notes:
            print_indented((note, "dim"))


def _lines(check: "Check") -> Iterator[str]:
    """Yield the differences of a check, of those that differ in names and numbers alone the first `_ALIKE`."""
    kinds: dict[str, list[str]] = {}
    for difference in check.differences:
        kinds.setdefault(_NUMBERS.sub("", difference.how), []).append(difference.line)
    for lines in kinds.values():
        yield from lines[:_ALIKE]
        if len(lines) > _ALIKE:
            yield f"and {len(lines) - _ALIKE:,} more of the same kind (--json names all)"


def _counts(check: "Check") -> str:
    compared = ", ".join(_some(count, unit) for unit, count in check.compared.items())
    wrong = ", ".join(_some(check.differing[unit], unit) for unit in check.compared if check.differing[unit])
    if not check.differences:
        return f"{compared}: equal" if compared else "nothing compared"
    alone = sum(check.differing.values()) == 1
    return f"{compared}: {wrong or f'{len(check.differences)} of them'} {'differs' if alone else 'differ'}"


def _some(count: int, unit: str) -> str:
    return counted(count, unit.removesuffix("s")) if unit.endswith("s") else f"{count:,} {unit}"
