"""The one parent of every description: frozen, and closed to keys nobody knows."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _at_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - what the description keeps is text


Place = Annotated[str, AfterValidator(_at_home)]
"""A path on this machine, with `~` as in a shell."""


class Spec(BaseModel):
    """A value that cannot be wrong: validated on the way in, immutable afterwards, hashable, comparable by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def later_key(default: Any, **field: Any) -> Any:
    """A key that descriptions of finished runs do not have: at its default it is not written and changes no digest."""
    return Field(default=default, exclude_if=lambda value: value == default, **field)
