"""Rounding as autograd and torch.compile see it: the straight-through estimator, and an opaque node of the graph.

Inductor removes casts down and up again (float32 -> bfloat16 -> float32), and would so round other numbers than eager
mode does: those in the model's dtype instead of the injection's. It does not look inside a custom operator, so that the
casts there stay.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4rl.numerics.levels import within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format, describe, format_of


def through(master: Tensor, copy: Tensor, reach: Tensor | None) -> Tensor:
    """Return `copy`, with its gradient passed to `master`. Under `torch.compile` as a sum that adds an exact zero."""
    if not (master.requires_grad and torch.is_grad_enabled()):
        return copy
    if torch.compiler.is_compiling():
        zero = master - master.detach()
        return copy + (zero if reach is None else zero * reach)
    return StraightThrough.apply(master, copy, reach)  # type: ignore[no-any-return, no-untyped-call]


class StraightThrough(torch.autograd.Function):
    """The rounded copy in the forward; in the backward the gradient goes to the master as it comes, or, where `reach`
    is given, only to values that were not clipped (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, _master: Tensor, copy: Tensor, reach: Tensor | None) -> Tensor:
        """Return `copy`, the rounded master of the same shape and dtype; `reach` is a bool mask, or None."""
        ctx.reach = reach
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient for the master; the other arguments have none."""
        return (gradients[0] if ctx.reach is None else gradients[0] * ctx.reach), None, None


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


@round_as.register_fake
def _(x: Tensor, _fmt: str, _dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@reach_as.register_fake
def _(x: Tensor, _fmt: str, _dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@lru_cache
def _read(fmt: str) -> Format:
    return format_of(json.loads(fmt))
