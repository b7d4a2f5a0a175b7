"""What validation found wrong, as one line in the words of the file: the key, what stands there, and the cure."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from fp4rl.spec.keys import below, keys_at
from fp4rl.spec.mistakes import nearest

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


def complaint(kind: type[BaseModel], error: ValidationError) -> str:
    """The first error in one line; a key that nobody knows comes before one that is missing, of which it may be a
    misspelling."""
    found = error.errors(include_url=False)
    first = min(found, key=lambda one: one["type"] == "missing")
    path = written(kind, first["loc"])
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}{nearest(path[-1], keys_at(kind, first['loc'][:-1]))}"
    if first["type"].startswith("union_tag"):
        path.append(first["ctx"]["discriminator"].strip("'"))
        where = ".".join(path)
    said = _said(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    return f"{where}: {said}" if where else said


def _said(sort: str, message: str, given: Any, about: dict[str, Any]) -> str:
    if sort == "value_error":
        return message.removeprefix("Value error, ")
    if sort in ("missing", "union_tag_not_found"):
        return "this key is required"
    if sort == "too_short":
        return "is empty; name at least one"
    if sort == "union_tag_invalid":
        known = [word.strip("'") for word in str(about["expected_tags"]).split(", ")]
        return f"{about['tag']!r} is not known{nearest(str(about['tag']), known)}"
    expected = next((words for start, words in _EXPECTED.items() if sort.startswith(start)), None)
    return f"expected {expected or _in_words(message)}, found {_shown(given)}"


def _in_words(message: str) -> str:
    words = message.removeprefix("Input should be ")
    return f"a number {words}" if words.startswith(("greater", "less", "a multiple")) else words


def _shown(given: Any) -> str:
    return "nothing" if given is None else repr(given)


def written(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys of a place as they stand in a file: pydantic also names the member of a union that it tried."""
    here: list[type[BaseModel]] = [kind]
    path = []
    for index, part in enumerate(place):
        known = any(part in model.model_fields for model in here)
        tried = isinstance(part, str) and ("[" in part or (here and not known and index + 1 < len(place)))
        if not tried:
            path.append(str(part))
        if known:
            here = below(here, str(part))
    return path
