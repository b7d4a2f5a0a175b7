"""The one parent of every description: frozen, and closed to keys nobody knows."""

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """A value that cannot be wrong: validated on the way in, immutable afterwards, hashable, comparable by content."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
