"""Turn errors of validation into one line in the words of the file: the key, its value, and the cure."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from fp4rl.spec.errors import nearest, shown
from fp4rl.spec.keys import keys_at, reached

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


def validation_message(kind: type[BaseModel], error: ValidationError) -> str:
    """Return the first error in one line; an unknown key comes before a missing one, which it may misspell."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda error: error["type"] == "missing")
    if first["type"] in ("extra_forbidden", "invalid_key"):
        *above, key = first["loc"]  # the key itself, whatever letters it has
        where = ".".join([*written(kind, above), str(key)])
        return f"unknown key {shown(where)}{nearest(str(key), keys_at(kind, above))}"
    path = written(kind, first["loc"])
    if first["type"].startswith("union_tag"):
        path.append(first["ctx"]["discriminator"].strip("'"))
    message = _said(first["type"], first["msg"], first["input"], first.get("ctx", {}))
    key, colon, rest = message.partition(": ")
    if colon and key in keys_at(kind, first["loc"]):  # values that are each allowed, and not together
        path, message = [*path, key], rest
    return ": ".join([".".join(path), message] if path else [message])


def _said(sort: str, message: str, given: Any, about: dict[str, Any]) -> str:
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
    return f"expected {expected or _in_words(message)}, found {_given(given)}"


def _in_words(message: str) -> str:
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
