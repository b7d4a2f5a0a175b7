"""The base class of every description: frozen, and closed to unknown keys."""

import os
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _expanded(path: Any) -> Any:
    """A path as text, which is what the description keeps; anything else is left for pydantic to refuse."""
    return os.path.expanduser(path) if isinstance(path, str | os.PathLike) else path  # noqa: PTH111


Place = Annotated[str, BeforeValidator(_expanded)]
"""A path on this machine, with `~` as in a shell."""


class Spec(BaseModel):
    """A value that is validated when it is made, immutable afterwards, hashable and compared by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def later_key(default: Any, **field: Any) -> Any:
    """A key that descriptions of finished runs do not have: at its default it is not written and changes no digest."""
    return Field(default=default, exclude_if=lambda value: value == default, **field)
