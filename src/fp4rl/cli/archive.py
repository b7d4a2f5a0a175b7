"""`fp4rl archive`: pack a suite into one file with checksums, or check such a file."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json, progress
from fp4rl.lab.archive import damages_of, pack, size_in_words
from fp4rl.spec.errors import CheckFailed, NotFoundError, nearest
from fp4rl.spec.words import counted

_SHOWN = 5


def command(
    suite: Annotated[str, typer.Argument(help="A suite below --runs; with --check the file of an archive.")],
    runs: RunsRoot = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="The file to write; SUITE.tar.gz here where none is named.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also pack the final policies.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the files of an archive with their checksums.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Pack what a suite's runs were told, did and measured into one file, with a checksum of every file.

    Example: `fp4rl archive quickstart --out quickstart.tar.gz`
    """
    if check:
        _check(Path(suite), as_json)
        return
    folder = runs / suite
    if not (folder / "suite.yaml").is_file():
        suites = [file.parent.name for file in runs.glob("*/suite.yaml")]
        raise NotFoundError(f"{runs} holds no suite {suite!r}{nearest(suite, suites)}")
    target = out or Path(f"{suite}.tar.gz")
    with progress() as advance:
        sums = pack(folder, target, weights=weights, on_file=partial(advance, "packing"))
    if as_json:
        print_json({"suite": suite, "archive": str(target), "files": sums})
        return
    console().print(f"{target}: {size_in_words(target, len(sums))}", soft_wrap=True)


def _check(archive: Path, as_json: bool) -> None:
    count, damages = damages_of(archive)
    if as_json:
        print_json({"archive": str(archive), "files": count, "damages": damages})
    elif not damages:
        console().print(f"{archive}: {size_in_words(archive, count)}, each as its checksum says", soft_wrap=True)
    if damages:
        more = f" and {len(damages) - _SHOWN} more" if len(damages) > _SHOWN else ""
        raise CheckFailed(f"{archive}: {counted(len(damages), 'difference')}: {'; '.join(damages[:_SHOWN])}{more}")
