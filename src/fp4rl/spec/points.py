"""Where an injection rounds: points, the modes that name formats for them at once, and the phases of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PlainSerializer, PlainValidator, field_validator, model_validator

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import MXFP4, MXFP8, NVFP4, Format, describe, format_of
from fp4rl.spec.frozen import NoneIsAWord, Spec
from fp4rl.spec.targets import compiled

Phase = Literal["rollout", "training", "evaluation", "reference"]
PHASES: tuple[Phase, ...] = get_args(Phase)

LINEAR_POINTS = ("weight", "input", "output")
GRADIENTS = ("grad_input", "grad_weight")
FORMAT_POINTS = (*LINEAR_POINTS, "kv_cache", *GRADIENTS)

_POLICY: tuple[Phase, ...] = ("rollout", "training", "evaluation")


def read_format(value: Any) -> Format:
    """Return `format_of(value)`; InvalidValueError for unknown names, as pydantic adds the key to ValueErrors alone."""
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

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that it names."""
        return tuple(fmt for fmt in (self.weight, self.input, self.output) if isinstance(fmt, Format))

    def _conflicts(self) -> Iterator[str]:
        compiled(self.pattern)
        if self.weight == self.input == self.output == "keep":
            yield f"{self.pattern!r} names no format; write weight, input or output, each a format or none"


class ApplyDuring(Spec):
    """The phases in which each point is active. A bare list stands for all points.

    The reference policy stays in full precision unless it is named, since the policy is compared with it. Hardware
    errors stay out of evaluations unless these are named. Gradient formats act wherever training computes a gradient.
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
        """Return the points that act in `phase`, gradient points and `errors` among them."""
        points = {point for point in type(self).model_fields if phase in getattr(self, point)}
        return frozenset(points | set(GRADIENTS) if phase == "training" else points)


class Smooth(Spec):
    """The derivative by which `straight_through: smooth` multiplies gradients (DGE, arXiv 2501.17116, eq. 8).

    Between two neighbouring levels, t in [0, 1] of the way, it is |2t - 1|^(1/k - 1) / k, at most `cap`; beyond the
    largest level it is 0.
    """

    sharpness: float = Field(default=5.0, gt=1.0, description="k; 1 would be `clipped`")
    cap: float = Field(default=3.0, gt=0.0, description="greatest derivative: half-way between levels it has no bound")
    points: tuple[Literal["weight", "input"], ...] = Field(
        default=("weight",), min_length=1, description="where; gradients of other points pass as they come"
    )


def can_clip(fmt: Format) -> bool:
    """Return whether values can be clipped: they cannot where every scale is rounded up."""
    down = fmt.scale_rule not in ("ceil", "rceil")
    return fmt.scale == "e4m3" or fmt.factor == "static" or (fmt.scale == "e8m0" and down)


def can_smooth(fmt: Format) -> bool:
    """Return whether the gradient of rounding can be smoothed: values go to the nearest level, each by itself."""
    apart = fmt.rotation is None and fmt.fallback is None
    return fmt.scale != "none" and apart and fmt.rounding not in ("stochastic", "toward_zero")


def as_served(point: str, fmt: Format) -> Format:
    """Return a format whose FP32 factor is that of deployments: weights as they are fused, all else per token."""
    if fmt.factor != "tensor" or fmt.scale not in ("e4m3", "fp32") or (fmt.block or (1, 1))[0] > 1:
        return fmt
    if point == "weight":
        return replace(fmt, factor="fused") if fmt.scale == "e4m3" else fmt
    return replace(fmt, factor="per_token")


@dataclass(frozen=True)
class Mode:
    """Formats of a linear layer's weight, of the input of its matmul, and of its output; None leaves one as it is.

    Blocks run along in_features, the reduction axis of the matmul, for weights and inputs alike.
    """

    name: str
    weight: Format | None
    input: Format | None
    output: Format | None
    meaning: str


_ALL = (
    Mode("none", None, None, None, "nothing is rounded"),
    Mode("w4a16", MXFP4, None, None, "MXFP4 weights"),
    Mode("w4a8", MXFP4, MXFP8, None, "MXFP4 weights, MXFP8 matmul inputs: a dense mode of Ascend"),
    Mode("w4a4", MXFP4, MXFP4, None, "MXFP4 weights and matmul inputs, as 4-bit kernels compute"),
    Mode("w16a4", None, MXFP4, None, "MXFP4 matmul inputs alone, to tell their error from the weights'"),
    Mode("w8a8", MXFP8, MXFP8, None, "MXFP8 weights and matmul inputs"),
    Mode(
        "nvfp4_w4a16", as_served("weight", NVFP4), None, None, "NVFP4 weights, one factor for those that a kernel fuses"
    ),
    Mode(
        *("nvfp4_w4a4", as_served("weight", NVFP4), as_served("input", NVFP4), None),
        "NVFP4 weights as nvfp4_w4a16 and matmul inputs, a factor for each token",
    ),
    Mode("w4a4_out", MXFP4, None, MXFP4, "MXFP4 weights and outputs; only to repeat older results"),
)
MODES: Mapping[str, Mode] = MappingProxyType({mode.name: mode for mode in _ALL})
