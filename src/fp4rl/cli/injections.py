"""From words such as FILE.yaml, NAME={mapping} or `mode=w4a4 deployment=amct` to injections of one's own by name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fp4rl.cli.terminal import say_once
from fp4rl.spec.errors import InvalidValueError, nearest, shown
from fp4rl.spec.evaluation import KNOWN_PROFILES
from fp4rl.spec.former_names import renamings
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import change_of, merge, read_yaml
from fp4rl.spec.plain_yaml import plain_values
from fp4rl.spec.points import MODES

Injections = Annotated[
    list[str] | None,
    typer.Option(
        "--injection",
        help='Any injection: "mode=w4a4 deployment=amct", or a YAML file with one, with several by name, or with '
        "advice of `fp4rl scan`; also NAME=FILE. May be repeated.",
        metavar="KEYS|FILE",
    ),
]

_KEYS = (*Injection.model_fields, "preset")
_BETWEEN = re.compile(r"\s+(?=[A-Za-z_][\w.]*=)")  # words of one injection
_NO_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")


def injections_by_name(words: Sequence[str], option: str, taken: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return name -> content of an injection, those that are `taken` first. Raises InvalidValueError for a name that
    stands there twice."""
    named = dict(taken or {})
    for word in words:
        for name, content in injections_of(word, option).items():
            if name in named:
                raise InvalidValueError(f"{option} {word}: {name!r} is named twice; write NAME=FILE")
            named[name] = content
    return named


def injections_of(word: str, option: str) -> dict[str, Any]:
    """Return name -> content of the injections that one word describes."""
    name, equals, what = word.partition("=")
    if equals and re.split(r"[.=]", word)[0] in _KEYS:
        content = _of_words(word, option)
        return {_name(content): content}
    if word in MODES:
        return {_name({"mode": word}): {"mode": word}}
    if is_file(word) and not equals:
        return _of_file(word, None, option)
    if is_file(what):
        return _of_file(what, name, option)
    if re.split(r"[.=]", what)[0] in _KEYS:
        return {name: _of_words(what, option)}
    mapping = plain_values(what, shown(what), "try '{weight: mxfp4, input: mxfp8}'") if equals else None
    if not isinstance(mapping, dict):
        forms = "NAME=FILE.yaml, NAME={mapping} of an injection, or keys such as mode=w4a4"
        raise InvalidValueError(f"{option} {shown(word)}: write {forms}{nearest(word, MODES)}")
    return {name: mapping}


def is_file(word: str) -> bool:
    """Return whether a word names a YAML file."""
    return word.endswith((".yaml", ".yml"))


def _of_words(text: str, option: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for word in words_in(text):
        if (head := re.split(r"[.=]", word)[0]) not in _KEYS:
            raise InvalidValueError(
                f"{option} {shown(text)}: no key of an injection is called {head!r}{nearest(head, _KEYS)}"
            )
        content = merge(content, change_of(f"injection.{word}"))
    injection: dict[str, Any] = content["injection"]
    return injection


def words_in(text: str) -> list[str]:
    """Split `key=value key=value` before each key, so that a value may hold blanks."""
    return _BETWEEN.split(text.strip())


def _name(content: Mapping[str, Any]) -> str:
    """Return a name for keys without one: their values where these are words, else the keys."""
    parts = [value if isinstance(value, str) else key for key, value in content.items()]
    name = _NO_NAME.sub("_", "+".join(parts)).strip("_.+-")
    return f"{next(iter(content))}_{name}" if name in KNOWN_PROFILES else name


def _of_file(file: str, name: str | None, option: str) -> dict[str, Any]:
    """Return the injections of a file: a description or fragment, an injection alone, or a mapping name -> either."""
    content, said = read_yaml(file), f"{option} {file if name is None else f'{name}={file}'}"
    say_once(renamings(content), f"{file}: ")
    if "arms" in content:
        raise InvalidValueError(f"{said}: a suite has many injections; name the spec.yaml of one of its runs")
    if "injection" not in content and not content.keys() & set(_KEYS) and all(map(_is_mapping, content.values())):
        if not content:
            raise InvalidValueError(f"{said}: the file is empty; write an injection, such as mode: w4a4")
        return {f"{name}.{own}" if name else str(own): _alone(each, said) for own, each in content.items()}
    # The description of every run is called spec.yaml, so the name of its folder is taken.
    path = Path(file)
    return {name or (path.resolve().parent.name if path.stem == "spec" else path.stem): _alone(content, said)}


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _alone(content: Mapping[str, Any], said: str) -> Any:
    injection = content.get("injection", content)
    if injection in (None, "none"):
        raise InvalidValueError(f"{said} injects nothing, which is the profile full")
    return injection
