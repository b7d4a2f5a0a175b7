"""What every verb shares on the screen: a console that prints strings as they are, JSON, progress, what is left out."""

import json
import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from fp4rl.engines.rounding import choose_backend
from fp4rl.spec.errors import CheckFailed

_left_out: dict[str, None] = {}


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


def ready_to_round() -> None:
    """Choose the backend, as FP4RL_BACKEND says, and show what is being compiled.

    Raises InvalidValueError where FP4RL_BACKEND names no backend that works here.
    """
    screen = console(stderr=True)
    choose_backend(lambda message: screen.print(message, style="dim"))


def leave_out(error: Exception) -> None:
    """Name, once a command line, something that cannot be read; the verb goes on, and its exit code will be 1."""
    if str(error) not in _left_out:
        _left_out[str(error)] = None
        console(stderr=True).print(f"left out: {error}", soft_wrap=True)


def forget_left_out() -> None:
    """Begin a new command line."""
    _left_out.clear()


def require_nothing_left_out() -> None:
    """Raise CheckFailed if anything was left out of this command line."""
    count = len(_left_out)
    if count:
        raise CheckFailed(f"{count} {'run is' if count == 1 else 'runs are'} damaged and left out, as named above")
