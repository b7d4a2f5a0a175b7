"""Scale rules worked out as tools do: op by op, every result rounded to a dtype, with an epsilon.

However it is computed, the code of a scale only grows with the block's largest magnitude, and by one at most within
half a binade. So one whole number for each half says all: what to add to the bits of amax so that its exponent field
becomes that of the scale, as `scales.carry` does for the exact rules.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp4rl.numerics.rounding import round_magnitude
from fp4rl.numerics.scales import E8M0_BIAS, LAYOUT, carried_codes
from fp4rl.spec.formats import E8M7, UOS_LIMIT, Element, Format

LEAST = torch.finfo(torch.float32).tiny  # a smaller block counts as one of zeros in four-over-six, whose scale is one
TIE = 1e-6  # msModelSlim's four-over-six takes a logarithm this near to a half for a tie
NARROW = {"bfloat16": E8M7, "float16": Element("FP16", 5, 10, 65504.0)}


def stepped(fmt: Format) -> bool:
    """Return whether a format's scales come from a table; all others from `scales.carry`."""
    plain = fmt.scale_math == "exact" and fmt.scale_epsilon == 0 and fmt.scale_min_exponent is None
    return not plain or fmt.scale_rule in ("round", "fouroversix")


def settled(fmt: Format, dtype: torch.dtype) -> Format:
    """Return the format with the dtype at hand in place of the word `tensor`."""
    if fmt.scale_math != "tensor":
        return fmt
    return replace(fmt, scale_math=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]


def rounder(fmt: Format, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what rounds float64 results to the dtype of the rule's arithmetic, as float64; `exact` keeps them.

    `dtype` is the tensor's. Narrow dtypes are computed in float32 and rounded a second time, as PyTorch does.
    """
    named = str(dtype).removeprefix("torch.") if fmt.scale_math == "tensor" else fmt.scale_math
    if named in ("exact", "float64"):
        return lambda x: x
    if named == "float32":
        return lambda x: x.float().double()
    element = NARROW[named]  # no cast: torch.compile leaves one away that another follows
    return lambda x: round_magnitude(x.float().double().abs(), element, "nearest_even").copysign(x)


def stepped_codes(amax: Tensor, fmt: Format, dtype: torch.dtype, largest: float | None = None) -> Tensor:
    """Return E8M0 codes as `scales.e8m0_codes`, 0 to 254, of a stepped format for a tensor of `dtype`.

    `largest` is the element's value that `fouroversix` maps amax to, 6 or 4.
    """
    whole, mantissa_bits, _ = LAYOUT[amax.dtype]
    up = torch.tensor(table(fmt, dtype, amax.dtype, largest), dtype=whole, device=amax.device)
    return carried_codes(amax, up[amax.view(whole) >> (mantissa_bits - 1)], fmt.element)


_MADE: dict[tuple[Format, torch.dtype, float | None], tuple[int, ...]] = {}


# Numbers and a dictionary: torch.compile looks through functools.cache, and takes one constant tensor of a name only.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def table(fmt: Format, dtype: torch.dtype, layout: torch.dtype, largest: float | None = None) -> tuple[int, ...]:
    """Return what to add to the bits of amax, two numbers for each exponent field of `layout` (float32 or float64)."""
    key = (settled(fmt, dtype), layout, largest)
    if key not in _MADE:
        _MADE[key] = _table(*key)
    return _MADE[key]


def _table(fmt: Format, dtype: torch.dtype, largest: float | None) -> tuple[int, ...]:
    whole, mantissa_bits, bias = LAYOUT[dtype]
    low = torch.arange(2 * (2 * bias + 1)) << (mantissa_bits - 1)
    high = low + (1 << (mantissa_bits - 1))

    least = -8 if fmt.scale_min_exponent is None else fmt.scale_min_exponent + E8M0_BIAS

    def codes(bits: Tensor) -> Tensor:
        amax = bits.to(whole).view(dtype).double()
        return (_exponents(amax, fmt, largest) + E8M0_BIAS).clamp(least, 255).long()

    first = codes(low)
    for _ in range(mantissa_bits - 1):  # bisection: `first` holds at low, not any more at high
        middle = low + ((high - low) >> 1)
        risen = codes(middle) > first
        low, high = torch.where(risen, low, middle), torch.where(risen, middle, high)
    field = first + (bias - E8M0_BIAS + fmt.element.max_exponent) + 1
    return (*((field << mantissa_bits) - high).tolist(), 0, 0)


def _exponents(amax: Tensor, fmt: Format, largest: float | None) -> Tensor:
    """Return the scale's exponent by its formula, float64; minus infinity for a block of zeros without an epsilon."""
    element, rounded, top = fmt.element, rounder(fmt, amax.dtype), fmt.element.max_exponent
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
    edge, width = (rounder(fmt, log2.dtype)(torch.tensor(x, dtype=torch.float64)) for x in (0.5 + TIE, TIE))
    whole = log2.floor()
    fraction = log2 - whole
    return whole + ((fraction > edge) | (((fraction - 0.5).abs() <= width) & (whole % 2 == 0)))
