"""The Triton backend for CUDA: each program loads whole blocks, scales and rounds them in registers and stores them.

It takes the same steps as the reference: largest magnitudes are found on the bits (as integers, NaN is above infinity
above every number), divisions are rounded to nearest, and stochastic rounding hashes the element's index. Triton's
interpreter (TRITON_INTERPRET=1) runs these kernels on a CPU.
"""

# Triton reads these functions as a language of its own: no types, and constants in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: N803

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4rl.numerics.blocks import columns_of
from fp4rl.numerics.rounding import Seed
from fp4rl.numerics.scales import carry
from fp4rl.numerics.steps import settled, stepped, table
from fp4rl.spec.formats import Format

ROUNDINGS = ("nearest_even", "half_away", "toward_zero", "stochastic", "half_added", "half_toward_zero")
ELEMENTS = 4096  # of one program: 32 values a thread in four warps
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
ERRORS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "exact": 3, "float64": 3}


def supports(x: Tensor, fmt: Format) -> bool:
    """Return whether the kernels know this format: blocks of powers of two, every rule but the least-error search."""
    if fmt.block is None or x.dtype not in DTYPES or fmt.scale_rule == "mse":
        return False
    height, width = fmt.block
    powers = all(side & (side - 1) == 0 for side in fmt.block)
    return powers and height * width <= ELEMENTS and (fmt.scale == "e8m0" or (fmt.scale == "e4m3" and height == 1))


def round_triton(x: Tensor, fmt: Format, seed: Seed | None, out: Tensor) -> Tensor:
    """Write `reference(x, fmt, seed)` into `out`, which may be x itself; both contiguous and on one device."""
    assert fmt.block is not None
    (height, width), columns = fmt.block, columns_of(x)
    rows = x.shape[-2] if height > 1 and x.ndim > 1 else x.numel() // columns  # of one matrix
    bands, across = -(-rows // height), -(-columns // width)
    blocks = x.numel() // (rows * columns) * bands * across
    together = max(1, ELEMENTS // (height * width))
    grid = (-(-blocks // together),)
    shape = (blocks, bands, across, rows, columns)
    layout = {"HEIGHT": height, "WIDTH": width, "TOGETHER": together, "RAGGED": height > 1 or columns % width > 0}
    options = {"DTYPE": DTYPES[x.dtype], "enable_fp_fusion": False}
    source, target = _as_bits(x), _as_bits(out)
    amax, by_row = source, fmt.factor == "per_token"  # read by formats of two levels alone
    if fmt.calibrated is not None:
        amax = torch.full((1,), fmt.calibrated, device=x.device).view(torch.int32)
    elif fmt.scale == "e4m3":
        amax = torch.zeros(rows if by_row else 1, dtype=torch.int32, device=x.device)
        _largest[grid](source, amax, *shape, **layout, **options, BY_ROW=by_row)
    first, second = seed or (0, 0)
    fmt = settled(fmt, x.dtype)
    constants = _constants(fmt)
    _round[grid](source, target, amax, _steps(fmt, x.device), *shape, first, second, **layout, **options, **constants)
    return out


@cache
def _steps(fmt: Format, device: torch.device) -> Tensor:
    """Return `steps.table` on the device, for four-over-six both; empty where the rule is one carry."""
    largest = (None, 4.0) if fmt.scale_rule == "fouroversix" else (None,)
    tables = [table(fmt, torch.float32, torch.float32, at) for at in largest] if stepped(fmt) else []
    return torch.tensor([up for each in tables for up in each], dtype=torch.int32, device=device)


def _as_bits(x: Tensor) -> Tensor:
    """View float32 and bfloat16 as integers, so that no cast on the way flushes a subnormal or truncates."""
    return x.view({torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(x.dtype, x.dtype))


def _constants(fmt: Format) -> dict[str, Any]:
    element = fmt.element
    return {
        "MANTISSA_BITS": element.mantissa_bits,
        "LEAST": (127 + element.min_exponent) << 23,
        "MAX_EXPONENT": element.max_exponent,
        "LARGEST": element.largest,
        "CARRY": carry(fmt.scale_rule, element, 23) if fmt.scale == "e8m0" and not stepped(fmt) else 0,
        "STEPPED": stepped(fmt),
        "ERRORS": ERRORS[fmt.scale_math] if fmt.scale_rule == "fouroversix" else -1,
        "ROUNDING": ROUNDINGS.index(fmt.rounding),
        "TWO_LEVELS": fmt.scale == "e4m3",
        "BY_ROW": fmt.factor == "per_token",
    }


@triton.jit
def _places(
    blocks, bands, across, rows, columns,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Compute the offsets of the program's blocks, [TOGETHER, HEIGHT * WIDTH], and a mask of those in bounds."""
    block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    inside = tl.arange(0, HEIGHT * WIDTH)
    in_bounds = (block < blocks)[:, None] & (inside >= 0)[None, :]
    if RAGGED:
        band = block // across
        row = (band % bands)[:, None] * HEIGHT + (inside // WIDTH)[None, :]
        column = (block % across)[:, None] * WIDTH + (inside % WIDTH)[None, :]
        at = ((band // bands)[:, None] * rows + row).to(tl.int64) * columns + column
        in_bounds = in_bounds & (row < rows) & (column < columns)
    else:  # whole one-row blocks lie one behind the other
        at = block.to(tl.int64)[:, None] * WIDTH + inside[None, :]
    return at, in_bounds


@triton.jit
def _load_bits(x, at, in_bounds, DTYPE: tl.constexpr):
    """Load the float32 bits of the values, as int32."""
    value = tl.load(x + at, mask=in_bounds, other=0)
    if DTYPE == 0:
        bits = value
    elif DTYPE == 1:
        bits = value.to(tl.int32) << 16
    else:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _store_bits(out, at, bits, in_bounds, DTYPE: tl.constexpr):
    """Store float32 bits, rounded to the nearest even value of the output's dtype."""
    if DTYPE == 0:
        value = bits
    elif DTYPE == 1:
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
        value = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, value).to(
            tl.int16
        )  # a GPU's NaN would carry into -0
    else:
        value = bits.to(tl.float32, bitcast=True).to(tl.float16)
    tl.store(out + at, value, mask=in_bounds)


@triton.jit
def _largest(
    x, amax, blocks, bands, across, rows, columns,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    """Find the bits of the largest magnitude in blocks without NaN and infinity (atomic maximum into `amax`), of all or
    BY_ROW of each."""
    at, in_bounds = _places(blocks, bands, across, rows, columns, HEIGHT, WIDTH, TOGETHER, RAGGED)
    most = tl.max(_load_bits(x, at, in_bounds, DTYPE) & 0x7FFFFFFF, axis=1)
    finite = tl.where(most < 0x7F800000, most, 0)
    if BY_ROW:
        block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
        tl.atomic_max(amax + block // across, finite, mask=block < blocks)
    else:
        tl.atomic_max(amax, tl.max(finite, axis=0))


@triton.jit
def _uniform(at, first, second):
    """Compute `rounding.uniform_at`: the same shifts, the same constants."""
    value = at.to(tl.uint32) ^ first.to(tl.uint32)
    value = (value ^ (value >> 16)) * 0x7FEB352D + second.to(tl.uint32)
    value = (value ^ (value >> 15)) * 0x846CA68B
    return ((value ^ (value >> 16)) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _on_grid(
    value, at, first, second,
    MANTISSA_BITS: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Compute `rounding.round_magnitude`; a NaN is lost here and comes back with the scale."""
    value = tl.where(value > LARGEST, LARGEST, value)
    binade = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, LEAST)
    if ROUNDING == 0:
        # Adding 2^23 grid steps leaves no bits below one step: the addition itself rounds to nearest even.
        magic = (binade + ((23 - MANTISSA_BITS) << 23)).to(tl.float32, bitcast=True)
        rounded = (value + magic) - magic
    else:
        step = binade - (MANTISSA_BITS << 23)
        steps = value * ((254 << 23) - step).to(tl.float32, bitcast=True)
        whole = tl.floor(steps)
        if ROUNDING == 1:
            whole += tl.where(steps - whole >= 0.5, 1.0, 0.0)
        if ROUNDING == 3:
            whole += tl.where(steps - whole > _uniform(at, first, second), 1.0, 0.0)
        if ROUNDING == 4:
            whole = tl.floor(steps + 0.5)
        if ROUNDING == 5:
            whole += tl.where(steps - whole > 0.5, 1.0, 0.0)
        rounded = whole * step.to(tl.float32, bitcast=True)
    return rounded


@triton.jit
def _as(value, DTYPE: tl.constexpr):
    """Round float64 to a dtype (3: none), a narrow one by way of float32, and return it as float64."""
    if DTYPE < 3:
        value = value.to(tl.float32)
        if DTYPE == 1:
            bits = value.to(tl.int32, bitcast=True)
            value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        if DTYPE == 2:
            value = value.to(tl.float16).to(tl.float32)
    return value.to(tl.float64)


@triton.jit
def _error(
    value, ratio, at,
    MANTISSA_BITS: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, ROUNDING: tl.constexpr,
    ERRORS: tl.constexpr,
):  # fmt: skip
    """Compute the squared error of blocks, [TOGETHER], under a scale `ratio` times the unit of `value`."""
    by = tl.div_rn(tl.full(ratio.shape, 1.0, tl.float32), ratio)
    nearest: tl.constexpr = 0 if ROUNDING == 3 else ROUNDING
    made = _on_grid(value * by[:, None], at, at, at, MANTISSA_BITS, LEAST, LARGEST, nearest) * ratio[:, None]
    error = _as((made - value).to(tl.float64), ERRORS)
    return _as(tl.sum(_as(error * error, ERRORS), axis=1), ERRORS)


@triton.jit
def _code(most, up, MAX_EXPONENT: tl.constexpr):
    """Compute `scales.carried_codes`."""
    return tl.minimum(tl.maximum(((most + up) >> 23) - MAX_EXPONENT, 0), 254)


@triton.jit
def _round(
    x, out, amax, steps, blocks, bands, across, rows, columns, first, second,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, RAGGED: tl.constexpr, DTYPE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, LEAST: tl.constexpr, MAX_EXPONENT: tl.constexpr, LARGEST: tl.constexpr,
    CARRY: tl.constexpr, STEPPED: tl.constexpr, ERRORS: tl.constexpr, ROUNDING: tl.constexpr, TWO_LEVELS: tl.constexpr,
    BY_ROW: tl.constexpr,
):  # fmt: skip
    """Compute `reference.round_blocks` for the program's blocks."""
    at, in_bounds = _places(blocks, bands, across, rows, columns, HEIGHT, WIDTH, TOGETHER, RAGGED)
    bits = _load_bits(x, at, in_bounds, DTYPE)
    magnitude = bits & 0x7FFFFFFF
    most = tl.max(magnitude, axis=1)
    value = magnitude.to(tl.float32, bitcast=True)
    if TWO_LEVELS:
        if BY_ROW:
            block = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
            largest = tl.load(amax + block // across, mask=block < blocks, other=0x3F800000)
            factor = tl.div_rn(tl.full([TOGETHER], 1.0, tl.float32), largest.to(tl.float32, bitcast=True))
        else:
            factor = tl.div_rn(1.0, tl.load(amax).to(tl.float32, bitcast=True))
        factor = factor * (448.0 * LARGEST)
        factor = tl.minimum(tl.maximum(factor, 1.1754943508222875e-38), 3.4028234663852886e38)
        wanted = factor * tl.div_rn(most.to(tl.float32, bitcast=True), LARGEST + tl.zeros_like(most).to(tl.float32))
        stored = _on_grid(wanted, at, first, second, 3, 121 << 23, 448.0, 0)
        scale = tl.div_rn(tl.where(stored == 0.0, 0.125, stored), factor + tl.zeros_like(stored))
        value = tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
    else:
        if STEPPED:
            code = _code(most, tl.load(steps + (most >> 22)), MAX_EXPONENT)
        else:
            code = _code(most, CARRY, MAX_EXPONENT)
        if ERRORS >= 0:  # four-over-six
            four = _code(most, tl.load(steps + 512 + (most >> 22)), MAX_EXPONENT)
            units = value * ((254 - code) << 23).to(tl.float32, bitcast=True)[:, None]
            unit = ((code - code + 127) << 23).to(tl.float32, bitcast=True)
            ratio = ((four - code + 127) << 23).to(tl.float32, bitcast=True)
            of_six = _error(units, unit, at, MANTISSA_BITS, LEAST, LARGEST, ROUNDING, ERRORS)
            of_four = _error(units, ratio, at, MANTISSA_BITS, LEAST, LARGEST, ROUNDING, ERRORS)
            code = tl.where(of_four < of_six, four, code)
        scale = tl.where(code > 0, code << 23, 0x400000).to(tl.float32, bitcast=True)  # code 0: subnormal 2^-127
        value = value * ((254 - code) << 23).to(tl.float32, bitcast=True)[:, None]  # times 2^(127 - code), exactly
    scale = tl.where(most < 0x7F800000, scale, float("nan"))  # a NaN or infinity makes its whole block NaN
    rounded = _on_grid(value, at, first, second, MANTISSA_BITS, LEAST, LARGEST, ROUNDING) * scale[:, None]
    _store_bits(out, at, rounded.to(tl.int32, bitcast=True) | (bits & -2147483648), in_bounds, DTYPE)
