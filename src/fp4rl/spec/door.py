"""The one door from YAML and `key=value` words to validated descriptions, with errors that name the cure."""

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fp4rl.spec.digest import canonical
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.keys import keys_at
from fp4rl.spec.mistakes import BadValue, NotThere, nearest
from fp4rl.spec.questions import check_questions

S = TypeVar("S", bound=BaseModel)


def load_spec(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment | Suite:
    """Read a YAML file (a suite if it has `arms`, else one experiment), overridden by `key.path=value` or `+file.yaml`.

    In a suite, `key.path=value` changes the base unless the key is the suite's own (`seeds=[0]`). `key.path=+file.yaml`
    lays the file's content there (`arms.w4a16=+advice.yaml`).
    Raises NotThere for a missing file, BadValue for anything in it that is not allowed; both name file, key and cure.
    """
    content = read_yaml(path)
    is_suite = "arms" in content
    for word in overrides:
        content = _override(content, word, is_suite)
    if not is_suite:
        return parse(Experiment, content, str(path))
    suite = parse(Suite, content, str(path))
    check_questions(suite.comparisons, dict(arm_contents(suite)), str(path))
    return suite


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML mapping from a file; BadValue names the line of a syntax error."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise NotThere(f"{file}: {what}; name a YAML file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise BadValue(f"{file}: {where}{getattr(error, 'problem', None) or error}; this is not valid YAML") from None
    except UnicodeDecodeError:
        raise BadValue(f"{file}: not a text file in UTF-8") from None
    if not isinstance(content, dict):
        raise BadValue(f"{file}: expected keys and values, found {type(content).__name__}")
    return content


def parse(kind: type[S], content: Mapping[str, Any], source: str) -> S:
    """Validate `content` as a `kind`; the first error becomes one line that names `source`, the key and the cure."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadValue(f"{source}: {_first_error(kind, error)}") from None


def arm_contents(suite: Suite) -> Iterator[tuple[str, Experiment]]:
    """Every arm crossed with every axis value as (name, experiment with seed 0), in the order of the file.

    Raises BadValue for arms that describe one experiment: their names would tell apart what is the same.
    """
    crossed: list[tuple[str, dict[str, Any]]] = [(name, merge(suite.base, a)) for name, a in suite.arms.items()]
    for key, values in suite.axes.items():
        last = key.rsplit(".", 1)[-1]
        crossed = [(f"{name}+{last}={value}", merge(c, {key: value})) for name, c in crossed for value in values]
    known: dict[str, str] = {}
    for name, content in crossed:
        experiment = parse(Experiment, content, f"suite {suite.suite}, arm {name}")
        twin = known.setdefault(canonical(experiment), name)
        if twin != name:
            raise BadValue(
                f"suite {suite.suite}: arms {twin} and {name} describe the same experiment; an override changes the "
                "base of all arms, `arms.NAME.key=value` and `arms.NAME=+file.yaml` change one"
            )
        yield name, experiment


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it: mappings merge key by key, anything else replaces; dotted keys are paths,
    except patterns of names, which have a star."""
    merged = deepcopy(dict(base))
    for key, value in change.items():
        # A layer number is a key too, and `*.layers.0.*` is one key.
        head, _, rest = str(key).partition(".") if "*" not in str(key) else (key, "", "")
        head = next((known for known in merged if str(known) == head), head)  # 0 and "0" are the same layer
        below = {rest: value} if rest else value
        present = merged.get(head)
        if isinstance(below, Mapping):
            merged[head] = merge(present if isinstance(present, Mapping) else {}, below)
        else:
            merged[head] = deepcopy(below)
    return merged


def _override(content: dict[str, Any], word: str, is_suite: bool) -> dict[str, Any]:
    if word.startswith("+"):
        change = read_yaml(word[1:])
    else:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise BadValue(f"{word!r}: an override is written key.path=value, or +file.yaml for a fragment")
        try:
            change = {key: read_yaml(text[1:]) if text.startswith("+") else yaml.safe_load(text)}
        except yaml.YAMLError:
            raise BadValue(f"{word!r}: the value is not valid YAML; quote it") from None
    if not is_suite:
        return merge(content, change)
    own = {k: v for k, v in change.items() if k.partition(".")[0] in Suite.model_fields}
    to_base = {k: v for k, v in change.items() if k not in own}
    return merge(content, {**own, **({"base": to_base} if to_base else {})})


def _first_error(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = keys_at(kind, first["loc"][:-1])
        return f"unknown key {where!r}{nearest(str(first['loc'][-1]), known)}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if first["type"] == "missing":
        return f"{where}: this key is required"
    return f"{where}: expected {message}, found {first['input']!r}"
