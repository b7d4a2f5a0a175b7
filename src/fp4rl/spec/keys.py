"""Which keys a description has at a path: for hints on wrong keys, and for keys that are named as values."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def keys_at(kind: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys that are valid at `path` below `kind`, following unions, optionals and discriminator tags."""
    here = [kind]
    for part in path:
        here = _below(here, str(part)) or here
    return sorted({name for k in here for name in k.model_fields})


def wrong_part(kind: type[BaseModel], path: Sequence[str]) -> int | None:
    """The index of the first part of `path` that is no key where it stands; None for a path that leads somewhere."""
    here = [kind]
    for index, part in enumerate(path):
        if not any(part in k.model_fields for k in here):
            return index
        here = _below(here, part)
        if not here:
            return None  # a value, or a mapping with keys of the user's own
    return None


def _below(kinds: list[type[BaseModel]], part: str) -> list[type[BaseModel]]:
    return [model for k in kinds if part in k.model_fields for model in _models_in(k.model_fields[part].annotation)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
