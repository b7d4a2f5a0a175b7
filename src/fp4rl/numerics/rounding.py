"""Rounding a magnitude onto the grid of a small float, by the spacing of the grid where the magnitude lies.

Stochastic rounding draws uniform numbers from a counter: a hash of the element's index under a seed, the same on every
backend and for every chunk. The mixer is the 32-bit finaliser of xor-shifts and multiplications by C. Wellons
("Prospecting for hash functions", lowbias32), with the second half of a 64-bit seed added between the rounds; numbers
from torch cost several times the rounding itself.
"""

import torch
from torch import Tensor

from fp4rl.spec.formats import Element, Rounding

Seed = tuple[int, int]  # two int32 halves

FIRST = 0x7FEB352D
SECOND = 0x846CA68B - (1 << 32)  # as int32
TO_UNIT = 2.0**-24

_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def spacing(magnitude: Tensor, element: Element) -> Tensor:
    """Return the distance between neighbouring grid values around each magnitude: a power of two, like `magnitude`."""
    whole, mask = _EXPONENT[magnitude.dtype]
    # 2^floor(log2 magnitude): the float's exponent bits alone. Subnormals have the spacing of the lowest binade.
    binade = (magnitude.clamp(min=2.0**element.min_exponent).view(whole) & mask).view(magnitude.dtype)
    return binade.mul_(2.0**-element.mantissa_bits)


def round_steps(steps: Tensor, rounding: Rounding, uniform: Tensor | None = None) -> Tensor:
    """Round non-negative `steps` to whole numbers; `uniform` in [0, 1), like `steps`, decides stochastic rounding.

    The fraction is taken by subtraction, which is exact; adding one half instead carries 0.49999997 up to 1, as the
    tools do that `half_added` stands for.
    """
    if rounding == "nearest_even":
        return steps.round()
    if rounding == "half_added":
        return (steps + 0.5).floor()
    whole = steps.floor()
    if rounding == "toward_zero":
        return whole
    fraction = steps - whole
    if rounding == "half_away":
        return whole + (fraction >= 0.5)
    if rounding == "half_toward_zero":
        return whole + (fraction > 0.5)
    if uniform is None:
        raise ValueError("stochastic rounding needs uniform numbers")
    return whole + (fraction > uniform)  # up with probability `fraction`, so that the mean is the value itself


def saturated(values: Tensor, rounding: Rounding) -> Tensor:
    """Clamp, in place, what stochastic rounding carried beyond the dtype's largest finite number; NaN stays NaN.

    With an infinity the mean of the draws would not be the value. Other roundings stay as deployment tools give them.
    """
    if rounding != "stochastic":
        return values
    largest = torch.finfo(values.dtype).max
    return values.clamp_(-largest, largest)


def round_magnitude(magnitude: Tensor, element: Element, rounding: Rounding, uniform: Tensor | None = None) -> Tensor:
    """Return the grid value for each non-negative magnitude, clipped to the element's largest; NaN stays NaN.

    Ties of `nearest_even` go to the even code (OCP MX v1.0 section 5.3), those of `half_away` and `half_added` up,
    those of `half_toward_zero` down.
    """
    clipped = magnitude.clamp(max=element.largest)
    step = spacing(clipped, element)
    return round_steps(clipped / step, rounding, uniform).mul_(step)


def draw_seed(generator: torch.Generator) -> Seed:
    """Draw one seed from the generator; the numbers for all elements follow from it without further draws."""
    pair = torch.randint(-(2**31), 2**31, (2,), generator=generator, device=generator.device, dtype=torch.int64)
    first, second = pair.tolist()
    return first, second


def uniform_at(index: Tensor, seed: Seed) -> Tensor:
    """Return a uniform float32 in [0, 1), a multiple of 2^-24, for each int32 index (taken modulo 2^32)."""
    x = index ^ seed[0]
    x = (x ^ _shifted(x, 16)) * FIRST + seed[1]
    x = (x ^ _shifted(x, 15)) * SECOND
    return _shifted(x ^ _shifted(x, 16), 8).to(torch.float32) * TO_UNIT


def _shifted(x: Tensor, bits: int) -> Tensor:
    # Torch's shift of int32 copies the sign bit into the top; the mask clears those copies.
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def uniform_matrix(rows: int, columns: int, seed: Seed, device: torch.device, first_row: int = 0) -> Tensor:
    """Return uniform float32 [rows, columns] by the row-major index of each element, from row `first_row` on."""
    start = torch.arange(first_row, first_row + rows, device=device, dtype=torch.int64).mul_(columns)
    start = start.bitwise_and_(0xFFFFFFFF).to(torch.int32)  # wraps, as the index does on every backend
    return uniform_at(start[:, None] + torch.arange(columns, device=device, dtype=torch.int32), seed)
