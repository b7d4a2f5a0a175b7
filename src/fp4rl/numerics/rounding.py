"""Rounding a magnitude onto the grid of a small float, by the spacing of the grid where the magnitude lies."""

import torch
from torch import Tensor

from fp4rl.spec.formats import Element, Rounding

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def spacing(magnitude: Tensor, element: Element) -> Tensor:
    """The distance between neighbouring grid values around each magnitude: a power of two, like `magnitude`."""
    whole, mask = _EXPONENT[magnitude.dtype]
    binade = (magnitude.clamp(min=2.0**element.min_exponent).view(whole) & mask).view(magnitude.dtype)
    return binade.mul_(2.0**-element.mantissa_bits)


def round_steps(steps: Tensor, rounding: Rounding, uniform: Tensor | None = None) -> Tensor:
    """Whole numbers for non-negative `steps`; `uniform` in [0, 1), like `steps`, decides stochastic rounding.

    The fraction is taken by subtraction, which is exact; adding one half instead would carry 0.49999997 up to 1.
    """
    if rounding == "nearest_even":
        return steps.round()
    whole = steps.floor()
    if rounding == "toward_zero":
        return whole
    fraction = steps - whole
    if rounding == "half_away":
        return whole + (fraction >= 0.5)
    if uniform is None:
        raise ValueError("stochastic rounding needs uniform numbers")
    return whole + (fraction > uniform)


def saturated(values: Tensor, rounding: Rounding) -> Tensor:
    """What stochastic rounding carried beyond the largest finite number of its dtype, put back to that number.

    An infinity would be no average of anything. What is rounded otherwise stays as deployment tools give it, infinity
    included. Changes `values` in place; NaN stays NaN.
    """
    if rounding != "stochastic":
        return values
    largest = torch.finfo(values.dtype).max
    return values.clamp_(-largest, largest)


def round_magnitude(magnitude: Tensor, element: Element, rounding: Rounding, uniform: Tensor | None = None) -> Tensor:
    """The grid value for each non-negative magnitude, clipped to the element's largest; NaN stays NaN.

    Ties of `nearest_even` go to the even code (OCP MX v1.0 section 5.3), those of `half_away` up.
    """
    clipped = magnitude.clamp(max=element.largest)
    step = spacing(clipped, element)
    return round_steps(clipped / step, rounding, uniform).mul_(step)
