"""Which keys a description has at a path, and what is wrong with one: in the words of the file, with the cure."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fp4rl.spec.errors import nearest, shown
from fp4rl.spec.formats import Format

_WORDS = {
    Any: "value",
    Format: "format",
    int: "whole number",
    float: "number",
    bool: "true | false",
    str: "text",
    type(None): "none",
}

# By pydantic's own names of errors, or how these begin.
_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "dict_type": "keys and values",
    "model_": "keys and values",
    "tuple_type": "a list",
    "list_type": "a list",
    "finite_number": "a finite number",
}


def keys_at(kind: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Return the keys that are valid at `path` below `kind`, following unions, optionals and discriminator tags."""
    models, _ = reached(kind, path)
    return sorted({name for model in models for name in model.model_fields})


def wrong_part(kind: type[BaseModel], path: Sequence[str]) -> int | None:
    """Return the index of the first part of `path` that is not a valid key; None for a path that exists."""
    for index, part in enumerate(path):
        models, own_name = reached(kind, path[:index])
        if not models:
            return None  # a value, or a mapping with keys of the user's own
        if not own_name and not any(part in model.model_fields for model in models):
            return index
    return None


def reached(kind: type[BaseModel], path: Sequence[int | str]) -> tuple[list[type[BaseModel]], bool]:
    """Return the models that may stand at `path`, and whether the next part is a name that a user chose.

    Positions in lists and the tags of unions do not change the models.
    """
    models, own_name = [kind], False
    for part in path:
        fields = [model.model_fields[str(part)].annotation for model in models if part in model.model_fields]
        if own_name or not fields:
            own_name = False
            continue
        models = [model for annotation in fields for model in _models_in(annotation)]
        own_name = bool(models) and any(get_origin(annotation) is dict for annotation in fields)
    return models, own_name


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, its type in words, its default (... where it is required) and its description."""

    path: str
    kind: str
    default: Any
    meaning: str


def described_keys(kind: type[BaseModel]) -> list[Key]:
    """Return all keys below `kind`, depth first in order of definition; below a union, those of every member."""
    by_path: dict[str, Key] = {}
    for key in _described(kind, ""):
        before = by_path.get(key.path, key)
        kinds = dict.fromkeys([*before.kind.split(" | "), *key.kind.split(" | ")])
        by_path[key.path] = replace(before, kind=" | ".join(kinds), meaning=before.meaning or key.meaning)
    return list(by_path.values())


def _described(kind: type[BaseModel], above: str) -> Iterator[Key]:
    for name, field in kind.model_fields.items():
        path = f"{above}{name}"
        given = None if field.is_required() else field.get_default(call_default_factory=True)
        default = ... if field.is_required() else None if isinstance(given, BaseModel) else given
        models = _models_in(field.annotation)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}  # where the type hides it
        meaning = field.description or (_first_sentence(models[0]) if len(models) == 1 else "")
        kind_in_words = str(extra.get("kind", _in_words(field.annotation)))
        yield Key(path, kind_in_words, extra.get("default", default), meaning)
        if get_origin(field.annotation) is not dict:  # else the keys stand below a name of the user's own
            for model in models:
                yield from _described(model, f"{path}.")


def _first_sentence(model: type[BaseModel]) -> str:
    paragraph = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    sentence = paragraph.partition(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:] if sentence[1:2] in (" ", *"abcdefghijklmnopqrstuvwxyz") else sentence


def _in_words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(parts[0])
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin in (tuple, list):
        return f"list of {_in_words(parts[0])}"
    if origin is dict:
        models = _models_in(parts[1])
        below = models[0].__name__.lower() if models else _in_words(parts[1])
        return "keys" if parts[1] is Any else f"name: {below}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys"
    return _WORDS.get(annotation, "text")


def validation_message(kind: type[BaseModel], error: ValidationError) -> str:
    """Return the first error in one line; an unknown key comes before a missing one, which it may misspell, and keys
    that stand where a word may stand too were not meant as one."""
    errors = error.errors(include_url=False)
    words = [error for error in errors if error["type"] == "literal_error" and isinstance(error["input"], Mapping)]
    first = min(errors, key=lambda error: (error in words, error["type"] == "missing"))
    if first["type"] in ("extra_forbidden", "invalid_key"):
        *above, key = first["loc"]  # the key itself, whatever letters it has
        where = ".".join([*written(kind, above), str(key)])
        return f"unknown key {shown(where)}{nearest(str(key), keys_at(kind, above))}"
    path = written(kind, first["loc"])
    if first["type"].startswith("union_tag"):
        path.append(first["ctx"]["discriminator"].strip("'"))
    message = _described_error(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    key, colon, rest = message.partition(": ")
    if colon and key in keys_at(kind, first["loc"]):  # values that are each allowed, and not together
        path, message = written(kind, (*first["loc"], key)), rest
    return ": ".join([".".join(path), message] if path else [message])


def _described_error(sort: str, message: str, given: Any, about: dict[str, Any]) -> str:
    if sort == "value_error":
        return message.removeprefix("Value error, ")
    if sort in ("missing", "union_tag_not_found"):
        return "this key is required"
    if sort == "string_too_long":
        return f"is {len(given)} letters long; {about['max_length']} fit"
    if sort == "string_pattern_mismatch":
        return f"{shown(given)} is no name: write letters, digits and ._-, since it names a folder"
    if sort == "too_short":
        return "is empty; name at least one"
    if sort == "union_tag_invalid":
        known = [word.strip("'") for word in str(about["expected_tags"]).split(", ")]
        return f"{about['tag']!r} is not known{nearest(str(about['tag']), known)}"
    expected = next((words for start, words in _EXPECTED.items() if sort.startswith(start)), None)
    return f"expected {expected or _limit(message)}, found {_given(given)}"


def _limit(message: str) -> str:
    words = message.removeprefix("Input should be ")
    return f"a number {words}" if words.startswith(("greater", "less", "a multiple")) else words


def _given(given: Any) -> str:
    if given is None:
        return "nothing"
    return {True: "true", False: "false"}[given] if isinstance(given, bool) else shown(given)


def written(kind: type[BaseModel], key_path: Sequence[int | str]) -> list[str]:
    """Return the keys of a location as they are written in a file: without the members of unions that were tried."""
    path = []
    for index, part in enumerate(key_path):
        models, own_name = reached(kind, key_path[:index])
        inside = bool(models) and index + 1 < len(key_path) and not any(part in model.model_fields for model in models)
        if own_name or isinstance(part, int) or not (inside or "[" in part):
            path.append(str(part))
    return path


def truth_as_number(given: Any, value: Any, above: str = "") -> str | None:
    """Return the message about a `true` or `false` of the file that became a number; None where there is none.

    `value` is what became of `given`, as plain values.
    """
    if isinstance(given, bool) and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{above}: expected a number, found {_given(given)}"
    became = _parts(value)
    for key, part in _parts(given).items():
        message = truth_as_number(part, became.get(key), f"{above}.{key}" if above else key)
        if message is not None:
            return message
    return None


def _parts(value: Any) -> dict[str, Any]:
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, list | tuple) else ())
    return {str(key): part for key, part in pairs}
