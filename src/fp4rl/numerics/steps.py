"""Scale rules worked out as tools do: op by op, every result rounded to a dtype, with an epsilon.

However it is computed, the code of a scale only grows with the block's largest magnitude, by one within a binade. So
one whole number a binade says all: what to add to the bits of amax so that its exponent field becomes that of the
scale, as `scales.carry` does for the exact rules.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from fp4rl.numerics.scales import E8M0_BIAS, LAYOUT, carried_codes
from fp4rl.spec.formats import UOS_LIMIT, Format

LEAST = torch.finfo(torch.float32).tiny  # a smaller block counts as one of zeros in four-over-six, whose scale is one
TIE = 1e-6  # msModelSlim's four-over-six takes a logarithm this near to a half for a tie
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*LAYOUT, torch.bfloat16, torch.float16)}


def stepped(fmt: Format) -> bool:
    """Return whether a format's scales come from a table; all others from `scales.carry`."""
    return fmt.scale_epsilon > 0 or fmt.scale_math != "exact" or fmt.scale_rule in ("round", "fouroversix")


def settled(fmt: Format, dtype: torch.dtype) -> Format:
    """Return the format with the dtype at hand in place of the word `tensor`."""
    if fmt.scale_math != "tensor":
        return fmt
    return replace(fmt, scale_math=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]


def rounder(fmt: Format) -> Callable[[Tensor], Tensor]:
    """Return what rounds float64 results to the dtype of the rule's arithmetic, as float64; `exact` keeps them.

    Narrow dtypes are computed in float32 and rounded a second time, as PyTorch does.
    """
    if fmt.scale_math == "exact":
        return lambda x: x
    dtype = DTYPES[fmt.scale_math]
    return lambda x: x if dtype == torch.float64 else x.float().to(dtype).double()


def stepped_codes(amax: Tensor, fmt: Format, largest: float | None = None) -> Tensor:
    """Return E8M0 codes as `scales.e8m0_codes`, 0 to 254, of a stepped format; `largest`: see `table`."""
    whole, mantissa_bits, _ = LAYOUT[amax.dtype]
    up = table(fmt, amax.dtype, largest).to(amax.device)[amax.view(whole) >> mantissa_bits]
    return carried_codes(amax, up, fmt.element)


@cache
def table(fmt: Format, dtype: torch.dtype, largest: float | None = None) -> Tensor:
    """Return what to add to the bits of amax, one number for each exponent field of `dtype` (float32 or float64).

    `largest` is the element's value that `fouroversix` maps amax to. A second step within one binade, which bfloat16
    knows beyond 2^62 only, is left out.
    """
    whole, mantissa_bits, bias = LAYOUT[dtype]
    fields = torch.arange(2 * bias + 1)
    low, high = fields << mantissa_bits, (fields + 1) << mantissa_bits

    def codes(bits: Tensor) -> Tensor:
        amax = bits.to(whole).view(dtype).double()
        return (_exponents(amax, fmt, largest) + E8M0_BIAS).clamp(-8, 255).long()

    first = codes(low)
    for _ in range(mantissa_bits):  # bisection: `first` holds at low, not any more at high
        middle = (low + high) >> 1
        risen = codes(middle) > first
        low, high = torch.where(risen, low, middle), torch.where(risen, middle, high)
    field = first + (bias - E8M0_BIAS + fmt.element.max_exponent) + 1
    return torch.cat(((field << mantissa_bits) - high, low.new_zeros(1))).to(whole)


def _exponents(amax: Tensor, fmt: Format, largest: float | None) -> Tensor:
    """Return the scale's exponent by its formula, float64; minus infinity for a block of zeros without an epsilon."""
    element, rounded, top = fmt.element, rounder(fmt), fmt.element.max_exponent
    epsilon = rounded(torch.tensor(fmt.scale_epsilon, dtype=torch.float64))

    def log2_over(by: float) -> Tensor:
        return rounded(torch.log2(rounded(rounded(amax / by) + epsilon)))

    match fmt.scale_rule:
        case "ceil":
            return log2_over(1).ceil() - top
        case "rceil":
            return log2_over(element.largest).ceil()
        case "even":
            return log2_over(1 - 2.0 ** -(element.mantissa_bits + 2)).floor() - top
        case "even_e2m1":
            return log2_over(0.875).floor() - top
        case "uos":
            return log2_over(UOS_LIMIT).ceil()
        case "round":
            return log2_over(element.largest).round()
        case "fouroversix":
            return _nearest(log2_over(largest or element.largest), fmt).where(amax >= LEAST, 0)
    return log2_over(1).floor() - top


def _nearest(log2: Tensor, fmt: Format) -> Tensor:
    """Return the nearest whole number as msModelSlim takes it: within TIE of a half the odd one."""
    if fmt.scale_math == "exact":
        return log2.round()
    edge, width = (rounder(fmt)(torch.tensor(x, dtype=torch.float64)) for x in (0.5 + TIE, TIE))
    whole = log2.floor()
    fraction = log2 - whole
    return whole + ((fraction > edge) | (((fraction - 0.5).abs() <= width) & (whole % 2 == 0)))
