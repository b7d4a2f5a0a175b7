"""The base classes of every description and of every record of a run: immutable, and closed to unknown keys."""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator


def at_home(path: str | os.PathLike[str]) -> str:
    """Expand `~` as a shell does: the home of nobody (`~name`) stays as it is, where pathlib would raise."""
    return os.path.expanduser(path)  # noqa: PTH111


def _expanded(path: Any) -> Any:
    """Return a path as text, `~` expanded; a value of another type is returned as it is, for pydantic to refuse."""
    return at_home(path) if isinstance(path, str | os.PathLike) else path


LocalPath = Annotated[str, BeforeValidator(_expanded)]
"""A path on this machine, with `~` as in a shell."""

WordOrList = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""Takes a single word for a list of one."""

NoneIsAWord = BeforeValidator(lambda value: None if value == "none" else value)
"""Takes the word `none` like YAML's `null`."""


class Spec(BaseModel):
    """A value that is validated when it is made, immutable afterwards, hashable and compared by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def _conflicts(self) -> Iterator[str]:
        """Yield an error for each combination of values that is not allowed; the first one is raised."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_conflict(self) -> Self:
        for conflict in self._conflicts():
            raise ValueError(conflict)
        return self


class Record(BaseModel):
    """One object of a file: immutable, closed to unknown keys, and strict about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_by_name=True, defer_build=True)

    def as_json(self) -> dict[str, JsonValue]:
        """Return the keys that were set, under their names on disk; the writer of a line of evidence adds `kind`."""
        content: dict[str, JsonValue] = self.model_dump(exclude_unset=True, by_alias=True)
        return content

    def extended(self, **more: Any) -> Self:
        """Return a copy with more keys, validated like the first."""
        return type(self)(**{key: getattr(self, key) for key in self.model_fields_set} | more)


def later_key(default: Any, **field: Any) -> Any:
    """Declare a key that older runs do not have: at its default it is not written, so that their digests stay."""
    return Field(default=default, exclude_if=lambda value: value == default, **field)
