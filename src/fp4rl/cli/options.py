"""Arguments and options that several verbs share, so that they read alike everywhere."""

from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(help="YAML file of a suite or of one experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value changes a key, +file.yaml lays a fragment over it.")
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder that holds all runs.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs side by side.")]
ReportTo = Annotated[
    list[str] | None, typer.Option("--report-to", help="wandb or mlflow, besides TensorBoard; may be given twice.")
]
