"""Values as verl's command line reads them: Hydra's grammar of overrides, then a shell's words."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

# Hydra reads a bare word as text where it is not a number, a truth or null.
_BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z/][A-Za-z0-9_./\-]*", re.IGNORECASE)


def written(value: Any) -> str:
    """Return a value in Hydra's grammar; `${` in a text stays a text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    text = str(value)
    if _BARE.fullmatch(text):
        return text
    quoted = re.sub(r"(\\*)(?=\"|$)", r"\1\1", text).replace('"', r"\"")  # a backslash counts before a quote alone
    return '"' + re.sub(r"(\\*)\$\{", r"\1\1\\${", quoted) + '"'


def words(configuration: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one override for each key."""
    return tuple(f"{key}={written(value)}" for key, value in configuration.items())


def in_a_shell(overrides: tuple[str, ...]) -> str:
    """Return overrides as the lines of one shell command, to stand after its first line."""
    return " \\\n".join(f"    {shlex.quote(word)}" for word in overrides)
