"""The block scale: from a block's largest magnitude to the number that its values are divided by.

Every rule for a power-of-two scale answers one question about amax = m * 2^k, 1 <= m < 2: does the exponent k go up by
one? The answer depends on m alone, so each rule is a threshold on m, and adding (2 - threshold) to the mantissa bits of
amax carries into the exponent exactly when m reaches it. No logarithm: log2 of the float32 just below 8 gives 3.0.
"""

import torch
from torch import Tensor

from fp4rl.spec.formats import UOS_LIMIT, Element, ScaleRule

E8M0_BIAS = 127
E8M0_LARGEST = 254  # byte 255 means NaN and is never a scale
E4M3_LARGEST = 448.0
FP32_LARGEST = torch.finfo(torch.float32).max
FP32_TINY = torch.finfo(torch.float32).tiny

LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def carry(rule: ScaleRule, element: Element, mantissa_bits: int) -> int:
    """Return what to add to the bits of amax so that its exponent goes up exactly where the rule raises the scale.

    floor: never. ceil: above 1 * 2^k. rceil: ceil(log2(amax / largest)). even: from the middle of the element's top
    step on, 7 * 2^k for E2M1. even_e2m1: that same 1.75 whatever the element. uos: ceil(log2(amax / 7.25)). `floor`
    is OCP MX v1.0 section 6.3; `mse` starts from it. The other rules are tables (`steps`).
    """
    unit = 1 << mantissa_bits
    top = 2.0**element.max_exponent
    match rule:
        case "floor" | "mse":
            return 0
        case "ceil":
            return unit - 1  # any bit of the mantissa carries
        case "rceil":  # threshold largest / 2^max_exponent, 1.5 for E2M1; less one, since equality must not carry
            return round((2 - element.largest / top) * unit) - 1
        case "even":  # threshold 2 less half a step of the top binade, 1.75 for E2M1
            return unit >> (element.mantissa_bits + 1)
        case "even_e2m1":
            return unit >> 2
        case "uos":
            return round((2 - UOS_LIMIT / top) * unit) - 1
        case "round" | "fouroversix" | "amax":
            raise ValueError(f"the rule {rule!r} has no carry")


def e8m0_codes(amax: Tensor, rule: ScaleRule, element: Element) -> Tensor:
    """Return power-of-two scales as E8M0 bytes: 0 (2^-127, also for a block of zeros) to 254 (2^127), as integers.

    `amax` is float32 or float64; the code of a NaN or an infinity is unspecified.
    """
    return carried_codes(amax, carry(rule, element, LAYOUT[amax.dtype][1]), element)


def carried_codes(amax: Tensor, up: int | Tensor, element: Element) -> Tensor:
    """Return the E8M0 codes that the exponent fields of amax give once `up` is added to its bits."""
    whole, mantissa_bits, bias = LAYOUT[amax.dtype]
    field = (amax.view(whole) + up) >> mantissa_bits
    # The exponent of amax less that of the element's largest value, in E8M0's bias.
    return (field - (bias - E8M0_BIAS + element.max_exponent)).clamp_(0, E8M0_LARGEST)


def power_of_two(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2^(code - 127) exactly, from bits; code 0 is a float32 subnormal, one bit of the mantissa."""
    whole, mantissa_bits, bias = LAYOUT[dtype]
    if bias == E8M0_BIAS:
        return (codes << mantissa_bits).clamp_(min=1 << (mantissa_bits - 1)).view(dtype)
    return ((codes.to(whole) + (bias - E8M0_BIAS)) << mantissa_bits).view(dtype)


def nan_where_not_finite(scale: Tensor, amax: Tensor) -> Tensor:
    """Return the scale, NaN for a block with a NaN or an infinity: the whole block becomes NaN (OCP MX v1.0 6.2)."""
    return scale + (amax - amax)  # 0 for a finite amax, NaN otherwise


def divided(amax: Tensor, by: float) -> Tensor:
    """Return amax / by, rounded once: torch on a GPU would multiply by the reciprocal of a number, rounding twice."""
    return amax / torch.full((), by, dtype=amax.dtype, device=amax.device)


def nvfp4_global(amax: Tensor, element: Element, by_row: bool = False) -> Tensor:
    """Return NVFP4's FP32 factor, [] float32, which maps the largest magnitude to 448 * 6; `by_row` one for each row of
    block maxima [rows, blocks, 1].

    A multiplier, as compressed-tensors stores it: a block's effective scale is its E4M3 scale divided by this.
    """
    finite = amax.masked_fill(~amax.isfinite(), 0)  # one block with a NaN must not spoil all others
    largest = finite.amax(-2, keepdim=True) if by_row else finite.amax()
    factor = largest.reciprocal() * (E4M3_LARGEST * element.largest)  # two roundings, as in compressed-tensors
    return factor.clamp(FP32_TINY, FP32_LARGEST).to(torch.float32)


def nvfp4_blocks(amax: Tensor, factor: Tensor, element: Element) -> Tensor:
    """Return the E4M3 block scales of NVFP4, float8_e4m3fn [like amax]; 0.125 where the scale would round to zero.

    The tensor's largest magnitude is then more than 448 * 2^10 times that block's; all values of the block round to
    zero under 0.125, as in compressed-tensors and in the CUDA kernels, and none is divided by zero.
    """
    wanted = (factor * divided(amax, element.largest)).clamp(max=E4M3_LARGEST)
    codes = wanted.to(torch.float32).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(codes == 0, 0x20, codes).view(torch.float8_e4m3fn)  # the code of 0.125


def fp32_scale(amax: Tensor, element: Element) -> Tensor:
    """Return one FP32 scale that maps amax to the element's largest magnitude; never zero, so that zeros stay zeros."""
    return divided(amax, element.largest).clamp(FP32_TINY, FP32_LARGEST).to(torch.float32)
