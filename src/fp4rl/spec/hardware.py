"""Errors that hardware makes in matmuls and memories, and the one table of which of them can act where."""

from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import Literal, get_args

from pydantic import Field, PositiveFloat

from fp4rl.spec.frozen import Spec
from fp4rl.spec.targets import Targets

ErrorKind = Literal["relative", "absolute", "jitter", "bias", "dead_zone", "saturation", "spikes", "stuck"]
ErrorPoint = Literal["matmul", "scores", "values", "input", "weight"]
Direction = Literal["forward", "backward", "both"]
Unit = Literal["value", "largest"]

SPARSE = ("spikes", "stuck")
PROPORTIONAL = ("relative", "jitter")
_PRODUCTS = ("matmul", "scores", "values")

# Why these pairs of kind and point never act; all other pairs do.
_NEVER = {
    **{
        (kind, "weight"): "a weight is stored, not computed, so nothing is drawn anew; use `noise` for noisy weights"
        for kind in ("relative", "absolute", "jitter")
    },
    ("bias", "weight"): "a stored number has no systematic offset of its own; take stuck, dead_zone or saturation",
}
_BACKWARD = {
    "input": "the backward matmuls read gradients; use point: matmul to change what they compute",
    "weight": "a stored weight is wrong in both directions; write when: both",
}


def _refusal(kind: str, point: str, when: str) -> str | None:
    if (kind, point) in _NEVER:
        return _NEVER[kind, point]
    if (kind, point) == ("bias", "scores") and when != "backward":
        return "the softmax is blind to a constant added to all scores; take point: values, or when: backward"
    if point == "weight":
        return None if when == "both" else _BACKWARD["weight"]
    return _BACKWARD.get(point) if when != "forward" else None


CAPABILITIES: Mapping[tuple[str, str, str], str | None] = MappingProxyType(
    {key: _refusal(*key) for key in product(get_args(ErrorKind), get_args(ErrorPoint), get_args(Direction))}
)
"""(kind, point, when) -> None where the error acts, else the reason why it cannot."""


class HardwareError(Spec):
    """One error at the sites of `targets`: on results of matmuls (`matmul` of linear layers, `scores` and `values` of
    attention), on a matmul's `input`, or on the stored `weight`.

    `relative` y + N(0,1) |y| scale and `absolute` y + N(0,1) scale are drawn by a generator of each site as a function
    of the seed, the step and the input, so that gradient checkpointing draws the same when it recomputes; `jitter` is
    `relative` from an unknown seed. `bias` y + scale; `dead_zone` 0 where |y| < scale; `saturation` clamps to +-scale;
    `spikes` adds +-scale to a `share` of the values; `stuck` sets a fixed `share` of the channels (the last axis) to
    `scale`. With `unit: largest` the scale is a share of the tensor's largest magnitude. In the backward the error acts
    on both products, grad_input and grad_weight.
    """

    kind: ErrorKind = "relative"
    point: ErrorPoint = Field(default="matmul", description="what the error acts on")
    when: Direction = Field(default="forward", description="in the forward, the backward, or both")
    scale: PositiveFloat = Field(default=0.05, description="its size")
    unit: Unit = Field(default="value", description="largest: the scale is a share of the largest magnitude")
    share: float | None = Field(default=None, gt=0.0, le=1.0, description="of spikes and stuck: how many are hit")
    targets: Targets = Targets()

    def _conflicts(self) -> Iterator[str]:
        if reason := CAPABILITIES[self.kind, self.point, self.when]:
            yield f"{self.kind} at {self.point}, {self.when}, would do nothing: {reason}"
        if (self.share is not None) != (self.kind in SPARSE):
            what = f"{self.kind} hits a share of the values; name it" if self.kind in SPARSE else "it would do nothing"
            yield f"`share` belongs to {' and '.join(SPARSE)} alone: {what}"
        if self.unit == "largest" and self.kind in PROPORTIONAL:
            yield f"unit: largest would do nothing: {self.kind} is in proportion to each value already"

    @property
    def name(self) -> str:
        """For evidence: the kind, the point and the direction."""
        return f"{self.kind}@{self.point}/{self.when}"

    @property
    def forward(self) -> bool:
        """Whether it acts in the forward."""
        return self.when != "backward"

    @property
    def backward(self) -> bool:
        """Whether it acts in the products of the backward (a stored weight is not one)."""
        return self.when != "forward" and self.point in _PRODUCTS
