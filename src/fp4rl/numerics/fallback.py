"""Blocks with outliers rounded twice: Q(x) + Q(x - Q(x)) in the blocks of a row that fall back, Q(x) in all others.

An outlier makes its block's step so large that its neighbours vanish; rounded again, what the first rounding left has
a step of its own. Source: block-level fallback (arXiv 2503.08040) by its criterion AbsMax, which there is held against
a threshold. Here a fixed share of each row's blocks falls back, so that what a token is rounded to depends on that
token alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping, columns_of
from fp4rl.numerics.reference import widened
from fp4rl.spec.formats import Format


def falling_back(x: Tensor, fmt: Format) -> Tensor:
    """Return a bool like x: whether its block is among those of its row with the largest magnitude; of equals the
    first are."""
    grouping = Grouping.of(x.shape, fmt)
    blocks = grouping.split(widened(x)).abs()
    largest = blocks.amax(-1)
    first = largest.argsort(dim=-1, descending=True, stable=True)[:, : fmt.twice(columns_of(x))]
    chosen = torch.zeros_like(largest, dtype=torch.bool).scatter_(-1, first, True)
    return grouping.join(chosen.unsqueeze(-1).expand_as(blocks).contiguous())


def remainder(x: Tensor, first: Tensor, chosen: Tensor) -> Tensor:
    """Return what the first rounding left in the chosen blocks, zero elsewhere; like x."""
    return (widened(x) - widened(first)).masked_fill(~chosen, 0).to(x.dtype)


def rounded_twice(x: Tensor, fmt: Format, once: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x [..., columns] as a format with a fallback rounds it, sums in x's dtype too; `once` is one rounding."""
    first, chosen = once(x), falling_back(x, fmt)
    both = widened(first) + widened(once(remainder(x, first, chosen)))
    return torch.where(chosen, both.to(x.dtype), first)
