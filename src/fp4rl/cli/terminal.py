"""What every verb shares on the screen: one console that prints strings as they are, and JSON for programs."""

import json
import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def console(stderr: bool = False) -> Console:
    """A console that fits the terminal or COLUMNS, and 100 columns where there is neither (a pipe, a log).

    A string is data, brackets and all: answers, paths and errors come from outside. What has a style is a `Text`.
    """
    plain = _console(stderr)
    sized = plain.is_terminal or "COLUMNS" in os.environ
    return plain if sized else _console(stderr, max(plain.width, 100))


def _console(stderr: bool, width: int | None = None) -> Console:
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """One line of strings and (string, style) pairs."""
    return Text.assemble(*parts)


def print_json(value: Any) -> None:
    """One JSON document on standard output, nothing else."""
    print(json.dumps(value, indent=2, sort_keys=False, allow_nan=False))


def progress(on: Console) -> Progress:
    """A bar with a count and the time left, on standard error; nothing of it stays, and nothing shows on a pipe."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=on,
        transient=True,
        disable=not on.is_terminal,
    )
