"""The points where an injection rounds, how a spec file names a format there, and when each point is active."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, field_validator, model_validator

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import Format, describe, format_of
from fp4rl.spec.frozen import NoneIsAWord, Spec
from fp4rl.spec.modes import PHASES, Phase
from fp4rl.spec.targets import compiled

LINEAR_POINTS = ("weight", "input", "output")
GRADIENTS = ("grad_input", "grad_weight")
FORMAT_POINTS = (*LINEAR_POINTS, "kv_cache", *GRADIENTS)

_POLICY: tuple[Phase, ...] = ("rollout", "training", "evaluation")


def read_format(value: Any) -> Format:
    """`format_of`, with unknown names as InvalidValueError: pydantic adds the key to ValueErrors alone."""
    try:
        return format_of(value)
    except NotFoundError as error:
        raise InvalidValueError(str(error)) from None


PointFormat = Annotated[Annotated[Format, PlainValidator(read_format), PlainSerializer(describe)] | None, NoneIsAWord]


class PatternFormats(Spec):
    """Formats for the sites that `pattern` matches; a point that is not named keeps the injection's own format."""

    pattern: str
    weight: PointFormat | Literal["keep"] = "keep"
    input: PointFormat | Literal["keep"] = "keep"
    output: PointFormat | Literal["keep"] = "keep"

    def _conflicts(self) -> Iterator[str]:
        compiled(self.pattern)
        if self.weight == self.input == self.output == "keep":
            yield f"{self.pattern!r} names no format; write weight, input or output, each a format or none"


class ApplyDuring(Spec):
    """The phases in which each point is active. A bare list stands for all points.

    The reference policy stays in full precision unless it is named: it is what the policy is held against. Hardware
    errors stay out of evaluations unless named. Gradient formats act wherever `training` computes a gradient.
    """

    weight: tuple[Phase, ...] = Field(default=_POLICY, min_length=1)
    input: tuple[Phase, ...] = Field(default=_POLICY, min_length=1)
    output: tuple[Phase, ...] = Field(default=_POLICY, min_length=1)
    kv_cache: tuple[Phase, ...] = Field(default=_POLICY, min_length=1)
    errors: tuple[Phase, ...] = Field(default=("rollout", "training"), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _all_points(cls, value: Any) -> Any:
        phases = (value,) if isinstance(value, str) else value
        return dict.fromkeys(cls.model_fields, tuple(phases)) if isinstance(phases, list | tuple) else value

    @field_validator("*")
    @classmethod
    def _in_order(cls, phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
        return tuple(phase for phase in PHASES if phase in phases)

    def active(self, phase: Phase) -> frozenset[str]:
        """The points that act in `phase`, gradient points and `errors` among them."""
        points = {point for point in type(self).model_fields if phase in getattr(self, point)}
        return frozenset(points | set(GRADIENTS) if phase == "training" else points)


def can_clip(fmt: Format) -> bool:
    """Whether a value can lie beyond what its block's scale reaches: no scale that is rounded up leaves one out."""
    return fmt.scale == "e4m3" or (fmt.scale == "e8m0" and fmt.scale_rule not in ("ceil", "rceil"))
