"""Codes and scales as a checkpoint holds them, two 4-bit codes a byte, and the way back to fake-quantized values.

    quantize(x) -> codes, scales    one code a byte
    pack / unpack                   low nibble = even column, high nibble = odd; a row starts on a byte of its own
    dequantize                      bit for bit `fake_quantize(x)`
    pack_tensor(x)                  pack(quantize(x)) in one step, by the C kernels where they are built

An E8M0 scale is its byte, exponent + 127, never 255; NVFP4 block scales are float8_e4m3fn under `factor`, a multiplier
(compressed-tensors' weight_global_scale). Layouts: compressed-tensors' mxfp4- and nvfp4-pack-quantized.
"""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from fp4rl.numerics import native
from fp4rl.numerics.blocks import Grouping, columns_of
from fp4rl.numerics.dispatch import native_library
from fp4rl.numerics.levels import Levels, inside
from fp4rl.numerics.quantize import seed_for
from fp4rl.numerics.reference import effective_scale, stored_scales, uniform_like, widened
from fp4rl.numerics.rounding import round_magnitude, saturated
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Element, Format


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor as codes [its shape] uint8 and scales, one a block, [..., blocks in a row] or [..., row, column blocks].

    `factor` is NVFP4's float32 multiplier for the tensor; `levels` undoes a coarse scale and a rotation.
    """

    codes: Tensor
    scales: Tensor
    factor: Tensor | None
    levels: Levels


@dataclass(frozen=True, eq=False)
class Packed:
    """4-bit codes, two a byte, [..., ceil(columns / 2)] uint8; for odd `columns` the last nibble is unused."""

    data: Tensor
    scales: Tensor
    factor: Tensor | None
    levels: Levels
    columns: int


@torch.no_grad()
def quantize(x: Tensor, fmt: Format, *, generator: torch.Generator | None = None, name: str = "tensor") -> Quantized:
    """Return codes and scales of `x` [any shape, at least one axis].

    Raises InvalidValueError, with `name`, for a format without codes, and for NaN or infinity, which have no code.
    """
    _check(x, fmt, name)
    seed = seed_for(fmt, generator, name)
    grouping = Grouping.of(x.shape, fmt)
    if not x.numel():
        return _no_values(x, fmt, grouping)
    inner, levels = inside(x, fmt)
    blocks = grouping.split(widened(inner))
    magnitude = blocks.abs()
    amax = magnitude.amax(grouping.axes, keepdim=True)
    if not bool(amax.isfinite().all()):
        raise _not_finite(fmt, name)
    stored, factor = stored_scales(magnitude, amax, grouping.axes, fmt, inner.dtype)
    uniform = None if seed is None else grouping.split(uniform_like(x, seed))
    units = magnitude / effective_scale(stored, factor, fmt, amax.dtype)
    rounded = round_magnitude(units, fmt.element, fmt.rounding, uniform).copysign(blocks)
    scales = stored.to(torch.uint8) if fmt.scale == "e8m0" else stored
    return Quantized(grouping.join(encode(rounded, fmt.element)), grouping.scales_outside(scales), factor, levels)


def _no_values(x: Tensor, fmt: Format, grouping: Grouping) -> Quantized:
    """Return codes and scales of a tensor without elements: as many scales as its axes give, each that of zeros."""
    zero = widened(x.new_zeros(1))
    stored, factor = stored_scales(zero, zero, (-1,), fmt, x.dtype)
    scales = (stored.to(torch.uint8) if fmt.scale == "e8m0" else stored).reshape(()).expand(grouping.shape_of_scales)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return Quantized(codes, scales.clone(), factor, Levels(fmt, x.dtype))


@torch.no_grad()
def dequantize(stored: Quantized | Packed, *, out: Tensor | None = None) -> Tensor:
    """Return the values in the tensor's own dtype, bit for bit those of `fake_quantize`; `out` takes them."""
    levels, fmt = stored.levels, stored.levels.fmt
    shape = stored.codes.shape if isinstance(stored, Quantized) else (*stored.data.shape[:-1], stored.columns)
    if out is not None and (out.shape != shape or out.dtype != levels.dtype):
        raise InvalidValueError(f"out is {out.dtype} {tuple(out.shape)}, the values are {levels.dtype} {tuple(shape)}")
    if not prod(shape):
        return torch.empty(shape, dtype=levels.dtype, device=stored.scales.device) if out is None else out
    if isinstance(stored, Packed):
        if (values := _fast_values(stored, out)) is not None:
            return saturated(values, fmt.rounding)
        stored = unpack(stored)
    dtype = torch.float64 if levels.dtype == torch.float64 else torch.float32
    grouping = Grouping.of(stored.codes.shape, fmt)
    scales = stored.scales.to(torch.int32) if fmt.scale == "e8m0" else stored.scales
    scale = grouping.scales_inside(effective_scale(scales, stored.factor, fmt, dtype))
    values = decode(grouping.split(stored.codes), fmt.element, dtype) * scale
    rounded = saturated(grouping.join(values).to(levels.dtype), fmt.rounding)
    result = saturated(levels.outside(rounded), fmt.rounding)
    return result if out is None else out.copy_(result)


def pack(stored: Quantized) -> Packed:
    """Pack two codes into a byte; raises InvalidValueError for elements that are not 4 bits wide."""
    fmt = stored.levels.fmt
    if fmt.element.bits != 4:
        raise InvalidValueError(f"{fmt.name}: only 4-bit codes pack two a byte, not {fmt.element.bits}-bit ones")
    columns = columns_of(stored.codes)
    codes = torch.nn.functional.pad(stored.codes, (0, columns % 2)).contiguous()
    if not codes.numel():  # nothing to join, and no two bytes that could be read as one number
        return Packed(codes[..., ::2], stored.scales, stored.factor, stored.levels, columns)
    pairs = codes.view(torch.int16)  # little-endian: the even column in the low byte
    data = (pairs | (pairs >> 4)).to(torch.uint8)
    return Packed(data, stored.scales, stored.factor, stored.levels, columns)


@torch.no_grad()
def pack_tensor(x: Tensor, fmt: Format, *, generator: torch.Generator | None = None, name: str = "tensor") -> Packed:
    """Compute `pack(quantize(x, fmt))`, in one pass where the C kernels are built; raises what those two raise."""
    _check(x, fmt, name)
    library = native_library(x.numel())
    if library is None or not x.numel() or not native.packs(x, fmt):
        return pack(quantize(x, fmt, generator=generator, name=name))
    made = native.pack_native(library, x.contiguous(), fmt, seed_for(fmt, generator, name))
    if made is None:
        raise _not_finite(fmt, name)
    return Packed(*made, Levels(fmt, x.dtype), columns_of(x))


def _fast_values(packed: Packed, out: Tensor | None) -> Tensor | None:
    """Compute `dequantize` by the C kernels; None where they are not built or do not know the format."""
    library = native_library(2 * packed.data.numel())
    dtype, fmt = packed.levels.dtype, packed.levels.fmt
    if library is None or not native.packs(packed.data.new_empty(0, dtype=dtype), fmt):
        return None
    fits = out is not None and out.is_contiguous() and out.device == packed.data.device
    target = out if fits else packed.data.new_empty(*packed.data.shape[:-1], packed.columns, dtype=dtype)
    assert target is not None
    native.unpack_native(library, packed.data, packed.scales, packed.factor, fmt, target)
    return target if out is None or fits else out.copy_(target)


def unpack(packed: Packed) -> Quantized:
    """Return the tensor with one code a byte again."""
    wide = packed.data.to(torch.int16)
    codes = ((wide & 0x0F) | ((wide & 0xF0) << 4)).view(torch.uint8)[..., : packed.columns]
    return Quantized(codes.contiguous(), packed.scales, packed.factor, packed.levels)


def _not_finite(fmt: Format, name: str) -> InvalidValueError:
    return InvalidValueError(f"{name}: holds NaN or infinity, for which {fmt.name} has no code; mend it first")


def _check(x: Tensor, fmt: Format, name: str) -> None:
    if fmt.scale == "none":
        raise InvalidValueError(f"{name}: {fmt.name} has no scale and no codes of its own; cast the tensor instead")
    if fmt.fallback is not None:
        raise InvalidValueError(f"{name}: no layout stores blocks that are rounded twice; leave fallback out")
    if fmt.factor == "per_token":
        raise InvalidValueError(f"{name}: no layout stores a factor for each token; {fmt.name} so is for inputs alone")
    if not x.is_floating_point() or not x.ndim:
        raise InvalidValueError(f"{name}: floats with at least one axis have codes, not {x.dtype} {tuple(x.shape)}")


def encode(values: Tensor, element: Element) -> Tensor:
    """Return uint8 codes of values on the grid, float32 or float64 in units of the scale; -0 has a code of its own.

    Positions of normal values are read off their float32 bits; below the smallest normal the grid is even.
    """
    magnitude = values.abs().float()
    first_normal = (127 + element.min_exponent - 1) << element.mantissa_bits
    normal = (magnitude.view(torch.int32) >> (23 - element.mantissa_bits)) - first_normal
    subnormal = (magnitude / element.smallest).to(torch.int32)
    position = torch.where(magnitude < 2.0**element.min_exponent, subnormal, normal)
    return (position | (torch.signbit(values).to(torch.int32) << (element.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """Return the grid values of uint8 codes, in units of the scale; NaN for a code that no finite value has."""
    return _values(element).to(codes.device, dtype)[codes.long()]


@cache
def _values(element: Element) -> Tensor:
    half = torch.full((1 << (element.bits - 1),), torch.nan, dtype=torch.float64)
    grid = torch.tensor(element.grid(), dtype=torch.float64)
    half[: len(grid)] = grid
    return torch.cat((half, -half))
