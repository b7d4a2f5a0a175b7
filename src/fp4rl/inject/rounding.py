"""Rounding as autograd and torch.compile see it: the straight-through estimator, and an opaque node of the graph.

Inductor removes casts down and up again (float32 -> bfloat16 -> float32), and would so round other numbers than eager
mode does: those in the model's dtype instead of the injection's. It does not look inside a custom operator, so that the
casts there stay.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4rl.numerics.levels import rotate, smooth_slope, within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import widened
from fp4rl.spec.formats import Format, describe, format_of
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS, can_clip, can_smooth


def through(master: Tensor, copy: Tensor, reach: Tensor | None, rotation: int | None = None) -> Tensor:
    """Return `copy`, with its gradient passed to `master`. Under `torch.compile` as a sum that adds an exact zero.

    `reach` is what the gradient is multiplied by, in the basis of blocks of `rotation` columns if that is given.
    """
    if not (master.requires_grad and torch.is_grad_enabled()):
        return copy
    if torch.compiler.is_compiling():
        zero = master - master.detach()
        return copy + _passed(zero, reach, rotation)
    return StraightThrough.apply(master, copy, reach, rotation)  # type: ignore[no-any-return, no-untyped-call]


def _passed(gradient: Tensor, reach: Tensor | None, rotation: int | None) -> Tensor:
    """Return the gradient times `reach`: of H Q(H x) with H = H^T the derivative is H diag(reach) H."""
    if reach is None or rotation is None:
        return gradient if reach is None else gradient * reach
    return rotate(rotate(widened(gradient), rotation) * reach, rotation).to(gradient.dtype)


class StraightThrough(torch.autograd.Function):
    """The rounded copy in the forward; in the backward the gradient goes to the master as it comes (Bengio et al. 2013,
    arXiv 1308.3432), or, where `reach` is given, times that."""

    @staticmethod
    def forward(ctx: Any, _master: Tensor, copy: Tensor, reach: Tensor | None, rotation: int | None) -> Tensor:
        """Return `copy`, the rounded master of the same shape; `reach` is a bool mask, a derivative or None."""
        ctx.reach, ctx.rotation = reach, rotation
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient for the master; the other arguments have none."""
        return _passed(gradients[0], ctx.reach, ctx.rotation), None, None, None


@dataclass(frozen=True)
class Estimator:
    """What the gradient of rounding to a format is multiplied by: a derivative of this `sharpness` up to `cap`; with
    sharpness 1 whether a value was not clipped. No gradient passes it to the scale."""

    sharpness: float
    cap: float

    @classmethod
    def of(cls, injection: Injection, point: str, fmt: Format) -> "Estimator | None":
        """Return that of a point; None where gradients pass as they come."""
        if injection.straight_through == "clipped" and point not in GRADIENTS and can_clip(fmt):
            return cls(1.0, 1.0)
        if injection.straight_through == "smooth" and point in injection.smooth.points and can_smooth(fmt):
            return cls(injection.smooth.sharpness, injection.smooth.cap)
        return None

    def factor(self, x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
        """Return the factor for each value of `x`: a bool, or a number in `dtype`."""
        if self.sharpness == 1:
            return within_reach(x, fmt)
        return smooth_slope(x, fmt, self.sharpness, self.cap).to(dtype)

    def in_graph(self, x: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
        """Return the factor for x cast to `dtype`, as a node of a compiled graph."""
        if self.sharpness == 1:
            return reach_as(x, fmt, dtype)  # type: ignore[no-any-return]
        return slope_as(x, fmt, dtype, self.sharpness, self.cap)  # type: ignore[no-any-return]


def format_text(fmt: Format) -> str:
    """Return a format as text, the form in which these operators take it: every process reads it the same."""
    return json.dumps(describe(fmt))


@torch.library.custom_op("fp4rl::round_as", mutates_args=())
def round_as(x: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    """Return Q(x cast to `dtype`) in x's own dtype, contiguous."""
    return fake_quantize(x.to(dtype), _read(fmt)).to(x.dtype, copy=True)


@torch.library.custom_op("fp4rl::reach_as", mutates_args=())
def reach_as(x: Tensor, fmt: str, dtype: torch.dtype) -> Tensor:
    """Return a bool like x: which values of x, cast to `dtype`, are not clipped."""
    return within_reach(x.to(dtype), _read(fmt)).contiguous()


@torch.library.custom_op("fp4rl::slope_as", mutates_args=())
def slope_as(x: Tensor, fmt: str, dtype: torch.dtype, sharpness: float, cap: float) -> Tensor:
    """Return the derivative of rounding x, cast to `dtype`, in x's own dtype."""
    return smooth_slope(x.to(dtype), _read(fmt), sharpness, cap).to(x.dtype).contiguous()


@slope_as.register_fake
def _(x: Tensor, _fmt: str, _dtype: torch.dtype, _sharpness: float, _cap: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@round_as.register_fake
def _(x: Tensor, _fmt: str, _dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@reach_as.register_fake
def _(x: Tensor, _fmt: str, _dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@lru_cache
def _read(fmt: str) -> Format:
    return format_of(json.loads(fmt))
