"""Code of the user's own that a description names: `file.py:function`, the file beside the suite."""

import os
import re
from pathlib import Path
from typing import Any

_IN_A_FILE = re.compile(r"(?P<file>[^\n]+\.py):(?P<function>[A-Za-z_]\w*)")


def in_a_file(name: str) -> tuple[str, str] | None:
    """Return file and function of `file.py:function`; None for any other name."""
    match = _IN_A_FILE.fullmatch(name)
    return (match["file"], match["function"]) if match else None


def beside(content: Any, folder: Path) -> Any:
    """Return unchecked values of a description in which each `file.py:function` names the file in `folder`, if there is
    one: from the current folder where that is above it, else by its whole path. Other names stay as they are."""
    if isinstance(content, dict):
        return {key: beside(value, folder) for key, value in content.items()}
    if isinstance(content, list):
        return [beside(value, folder) for value in content]
    named = in_a_file(content) if isinstance(content, str) else None
    if named is None:
        return content
    file = folder / os.path.expanduser(named[0])  # noqa: PTH111 - `~name` of nobody stays as it is
    if not file.is_file():
        return content
    whole, here = file.resolve(), Path.cwd()
    return f"{whole.relative_to(here) if whole.is_relative_to(here) else whole}:{named[1]}"
