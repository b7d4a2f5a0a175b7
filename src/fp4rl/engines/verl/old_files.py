"""Settings out of a shell script or a YAML file of verl: dotted keys, and variables that the script exports."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4rl.engines.verl.old import AROUND, flat, is_added
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.load import read_yaml

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_SETTING = re.compile(r"[ \t]*[+~]*[a-z_]+(?:\.\w+)+=")
_LISTED = re.compile(rf"\n{_SETTING.pattern}")  # in a variable such as COMMON_ARGS, one a line
_EXPANSION = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_UNKNOWN = re.compile(r"\$[\w{(]|`")
_MOST_EXPANSIONS = 20


def settings_in(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings in a script or a YAML file by dotted key, and the variables of the fork that it sets.

    A script's own variables are filled in, as far as it says what they are. Raises InvalidValueError where one of the
    fork's settings stays unknown, and where nothing is found.
    """
    if file.suffix in (".yaml", ".yml"):
        nested = dict(flat(read_yaml(file)))
        return {k: v for k, v in nested.items() if "." in k}, {k: str(v) for k, v in nested.items() if "." not in k}
    settings, variables = _in_script(_text(file))
    for key, value in settings.items():
        if _UNKNOWN.search(value) and not key.startswith(AROUND):
            raise InvalidValueError(
                f"{file}: {key}={value} depends on what only a shell knows; write the value into it"
            )
    known = {key: value for key, value in settings.items() if not _UNKNOWN.search(value)}
    env = {key: value for key, value in variables.items() if is_added(key)}
    if not (known or env):
        raise InvalidValueError(f"{file}: holds no setting of verl (KEY.PATH=VALUE); name its script or a YAML file")
    return known, env


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidValueError(f"{file}: not a text file in UTF-8; name a script or a YAML file") from None


def _in_script(text: str) -> tuple[dict[str, str], dict[str, str]]:
    lines = (line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))
    settings, variables = dict[str, str](), dict[str, str]()
    try:
        words = shlex.split("\n".join(lines), comments=False)
        for word in words:
            _take(word, settings, variables)
    except ValueError as why:
        raise InvalidValueError(f"the script cannot be read ({why}); is a quotation mark missing?") from None
    return settings, variables


def _take(word: str, settings: dict[str, str], variables: dict[str, str]) -> None:
    """Take one word: an assignment, a setting, or a variable that holds settings. The last value of each counts."""
    name, equals, value = word.partition("=")
    if equals and _VARIABLE.fullmatch(name):
        variables[name] = _expanded(value, variables)
        return
    word = _expanded(word, variables)
    inner = [word] if _SETTING.match(word) else shlex.split(word) if _LISTED.search(word) else []
    for each in inner:
        if _SETTING.match(each):
            key, _, given = each.partition("=")
            settings[key.lstrip("+~")] = given


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """Fill in variables that are known, then defaults (`${NAME:-8}`); what is neither stays as it is."""

    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        return variables.get(name, match[0] if default is None else default)

    for _ in range(_MOST_EXPANSIONS):
        filled = _EXPANSION.sub(value, text)
        if filled == text:
            break
        text = filled
    return text
