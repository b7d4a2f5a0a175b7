"""The coarse level: one FP32 scale for a long run of columns, above the blocks' powers of two.

A power of two misses a block's ideal scale by up to a factor of two; a real-valued factor for the whole run moves
its blocks to where the error is least. Sources: Ascend's dual-level cast (CANN aclnnDynamicDualLevelMxQuant: runs
of 512, the largest magnitude divided by 6, the quotient kept in the input's dtype) and macro-block scaling by 128
(arXiv 2603.08713).
"""

from dataclasses import replace

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.reference import reference
from fp4rl.numerics.scales import FP32_LARGEST, FP32_TINY, divided
from fp4rl.spec.formats import Coarse, Format

FRACTIONS = 16  # of a power of two: all that the E8M0 scales below leave open


def coarse_scale(x: Tensor, fmt: Format, coarse: Coarse) -> Tensor:
    """The scale of every run of columns, [rows, runs, 1], positive and finite; `x` [..., columns] float32 or float64.

    `max` maps the run's largest finite magnitude to the element's largest, exactly as Ascend does. `search` divides
    that scale by 2^(i/16), i = 0..15, and keeps the first of least squared error.
    """
    runs = Grouping(x.shape, (1, coarse.columns)).split(x)
    runs = runs.masked_fill(~runs.isfinite(), 0)
    top = divided(runs.abs().amax(-1, keepdim=True), fmt.element.largest).clamp(FP32_TINY, FP32_LARGEST).float()
    return top.to(x.dtype) if coarse.choice == "max" else _of_least_error(runs, top, fmt).to(x.dtype)


def _of_least_error(runs: Tensor, top: Tensor, fmt: Format) -> Tensor:
    rounding = "nearest_even" if fmt.rounding == "stochastic" else fmt.rounding
    inner = replace(fmt, coarse=None, rotation=None, rounding=rounding)
    best, least = top, torch.full_like(top, torch.inf, dtype=torch.float64)
    for i in range(FRACTIONS):
        scale = top * 2.0 ** (-i / FRACTIONS)
        error = (reference(runs / scale, inner) * scale - runs).double() / top
        error = error.square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return best


def divided_by_coarse(x: Tensor, scale: Tensor, coarse: Coarse) -> Tensor:
    """`x` with every run of columns divided by its scale."""
    grouping = Grouping(x.shape, (1, coarse.columns))
    return grouping.join(grouping.split(x) / scale)


def multiplied_by_coarse(x: Tensor, scale: Tensor, coarse: Coarse) -> Tensor:
    """`x` with every run of columns multiplied by its scale."""
    grouping = Grouping(x.shape, (1, coarse.columns))
    return grouping.join(grouping.split(x) * scale)
