"""What every verb shares on the screen: one console, and JSON that a program can read."""

import json
import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console(stderr: bool = False) -> Console:
    """A console that fits the terminal or COLUMNS, and 100 columns where there is neither (a pipe, a log)."""
    plain = Console(stderr=stderr)
    sized = plain.is_terminal or "COLUMNS" in os.environ
    return plain if sized else Console(stderr=stderr, width=max(plain.width, 100))


def print_json(value: Any) -> None:
    """One JSON document on standard output, nothing else."""
    print(json.dumps(value, indent=2, sort_keys=False, allow_nan=False))


def progress(on: Console) -> Progress:
    """A bar with a count and the time left, on standard error; nothing of it stays, and nothing shows on a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=on,
        transient=True,
        disable=not on.is_terminal,
    )
