"""Grid values as codes: sign, then the value's position on the grid, which is its exponent and mantissa side by
side."""

from functools import cache

import torch
from torch import Tensor

from fp4rl.spec.formats import Element


def encode(values: Tensor, element: Element) -> Tensor:
    """uint8 codes of values on the grid (in units of the scale); float32 or float64, same shape. -0 has a code of
    its own.

    Positions of normal values are read off their float32 bits; below the smallest normal the grid is even.
    """
    magnitude = values.abs().float()
    first_normal = (127 + element.min_exponent - 1) << element.mantissa_bits
    normal = (magnitude.view(torch.int32) >> (23 - element.mantissa_bits)) - first_normal
    subnormal = (magnitude / element.smallest).to(torch.int32)
    position = torch.where(magnitude < 2.0**element.min_exponent, subnormal, normal)
    return (position | (torch.signbit(values).to(torch.int32) << (element.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """The grid values of uint8 codes, in units of the scale; NaN for a code that no finite value has."""
    return _values(element).to(codes.device, dtype)[codes.long()]


@cache
def _values(element: Element) -> Tensor:
    half = torch.full((1 << (element.bits - 1),), torch.nan, dtype=torch.float64)
    grid = torch.tensor(element.grid(), dtype=torch.float64)
    half[: len(grid)] = grid
    return torch.cat((half, -half))
