"""Arguments and options that several verbs share, so that they read alike everywhere, and the files that they write."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from fp4rl.spec.errors import InvalidValueError

SpecFile = Annotated[Path, typer.Argument(help="YAML file of a suite or of one experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value changes a key, +file.yaml lays a fragment over it.")
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder that holds all runs.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs side by side.")]
ReportTo = Annotated[
    list[str] | None, typer.Option("--report-to", help="wandb or mlflow, besides TensorBoard; may be given twice.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        envvar="FP4RL_LEDGER",
        help="File or postgresql://user@host/name; RUNS/ledger.db where none is named.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead.")]


def require_writable(file: Path | None, option: str, *, new: bool = False) -> None:
    """Raise InvalidValueError where `file`, given as `option`, could not be written after the work, or where it should
    be `new` and is there."""
    if file is None:
        return
    if new and file.is_file():
        raise InvalidValueError(f"{option} {file}: is there already; name another file")
    if file.is_dir():
        raise InvalidValueError(f"{option} {file}: is a folder; name a file")
    if not file.parent.is_dir():
        raise InvalidValueError(f"{option} {file}: there is no folder {file.parent}; make it, or name another place")
    if file.exists() and os.access(file, os.W_OK):  # such as /dev/stdout, whose folder is not the user's
        return
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InvalidValueError(f"{option} {file}: cannot write there ({error.strerror}); name another place") from None


def write_fragment(file: Path, comments: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write a fragment for `fp4rl run SPEC +FILE` as YAML, with lines of comment above it."""
    lines = "".join(f"# {comment}\n" for comment in comments)
    file.write_text(lines + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
