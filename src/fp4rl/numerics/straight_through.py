"""Fake quantization that a gradient passes through: the forward is rounded, the backward takes it for something
simpler."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reach import within_reach
from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.formats import Format

Variant = Literal["identity", "clipped"]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor:
        return fake_quantize(x, fmt, generator=generator)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


class _RoundedUnlessClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format, generator: torch.Generator | None) -> Tensor:
        ctx.save_for_backward(within_reach(x, fmt))
        return fake_quantize(x, fmt, generator=generator)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (reachable,) = ctx.saved_tensors
        return gradients[0] * reachable, None, None


def straight_through(
    x: Tensor, fmt: Format, variant: Variant = "identity", generator: torch.Generator | None = None
) -> Tensor:
    """`fake_quantize(x, fmt)` with a gradient (Bengio et al. 2013, arXiv 1308.3432).

    `identity` hands back the gradient that arrives; `clipped` hands back zero for values beyond the largest
    magnitude that their block can hold. Raises InvalidValueError for an unknown variant and for what `fake_quantize`
    refuses.
    """
    if variant not in get_args(Variant):
        raise InvalidValueError(f"straight_through knows no variant {variant!r}{nearest(variant, get_args(Variant))}")
    rounded = _Rounded if variant == "identity" else _RoundedUnlessClipped
    return rounded.apply(x, fmt, generator)  # type: ignore[no-any-return, no-untyped-call]
