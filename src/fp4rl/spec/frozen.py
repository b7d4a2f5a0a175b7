"""The base class of every description: frozen, and closed to unknown keys."""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _expanded(path: Any) -> Any:
    """Return a path as text, which is what the description keeps; anything else is left for pydantic to refuse."""
    return os.path.expanduser(path) if isinstance(path, str | os.PathLike) else path  # noqa: PTH111


LocalPath = Annotated[str, BeforeValidator(_expanded)]
"""A path on this machine, with `~` as in a shell."""

WordOrList = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""One word stands for a list of one."""

NoneIsAWord = BeforeValidator(lambda value: None if value == "none" else value)
"""`none` stands for nothing, as in YAML `null` does."""


class Spec(BaseModel):
    """A value that is validated when it is made, immutable afterwards, hashable and compared by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def _conflicts(self) -> Iterator[str]:
        """Yield what is wrong with values that are each allowed; the first refuses the description."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_conflict(self) -> Self:
        for conflict in self._conflicts():
            raise ValueError(conflict)
        return self


def later_key(default: Any, **field: Any) -> Any:
    """A key that descriptions of finished runs do not have: at its default it is not written and changes no digest."""
    return Field(default=default, exclude_if=lambda value: value == default, **field)
