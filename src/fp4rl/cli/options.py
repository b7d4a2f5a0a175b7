"""Arguments and options that several verbs share, and the writing of files that options name."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from fp4rl.cli.terminal import say_once
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.former_names import of_deployment, renamings

SpecFile = Annotated[Path, typer.Argument(help="YAML file of a suite or of one experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value changes a key, +file.yaml merges a fragment.")
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder of all runs.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", "--max-parallel", min=1, help="Number of runs at a time.")]
AtScale = Annotated[
    Literal["tiny", "full"] | None,
    typer.Option("--scale", help="Of an experiment of the catalogue: tiny (embedded model, the default) or full."),
]
ReportTo = Annotated[
    list[str] | None, typer.Option("--report-to", help="wandb or mlflow, besides TensorBoard; may be given twice.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        envvar="FP4RL_LEDGER",
        help="File, or address of PostgreSQL (postgresql://...); RUNS/ledger.db where none is named.",
    ),
]
Deployed = Annotated[
    str | None,
    typer.Option("--deployment", help="Whose rules the formats have (`fp4rl deployments`); the spec's own, else ocp."),
]
FormerPreset = Annotated[str | None, typer.Option("--preset", hidden=True, help="The former name of --deployment.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def asked_deployment(deployment: str | None, preset: str | None) -> str | None:
    """Return what `--deployment` or the former `--preset` names; what a former name is read as is said on stderr."""
    given = {"deployment": deployment} | ({"preset": preset} if preset is not None else {})
    say_once(renamings({key: value for key, value in given.items() if value is not None}))
    name: str | None = of_deployment(given).get("deployment")
    return name


def require_writable(file: Path | None, option: str, *, new: bool = False) -> None:
    """Raise InvalidValueError, before the work, where `file` cannot be written, or must be `new` and exists."""
    if file is None:
        return
    if new and file.is_file():
        raise InvalidValueError(f"{option} {file}: is there already; name another file")
    if file.is_dir():
        raise InvalidValueError(f"{option} {file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise InvalidValueError(f"{option} {file}: there is no folder {file.parent}; make it, or name another place")
    if file.exists() and os.access(file, os.W_OK):  # also /dev/stdout, whose folder cannot be written
        return
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InvalidValueError(f"{option} {file}: cannot write there ({error.strerror}); name another place") from None


def write_fragment(file: Path, comments: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write a fragment for `fp4rl run SPEC +FILE` as YAML, below comment lines."""
    lines = "".join(f"# {comment}\n" for comment in comments)
    file.write_text(lines + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
