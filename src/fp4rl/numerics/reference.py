"""The definition: what a format does to a tensor, in plain PyTorch. Every faster backend equals it bit for bit.

magnitudes -> one scale a block -> magnitude / scale rounded onto the grid -> times scale, the sign put back

`round_chunked` is the same in pieces that stay in the cache: several times faster, and needs no compiler.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping, columns_of
from fp4rl.numerics.rounding import Seed, round_magnitude, uniform_matrix
from fp4rl.numerics.scales import (
    E8M0_BIAS,
    E8M0_LARGEST,
    e8m0_codes,
    fp32_scale,
    nan_where_not_finite,
    nvfp4_blocks,
    nvfp4_global,
    power_of_two,
)
from fp4rl.numerics.steps import rounder, stepped, stepped_codes
from fp4rl.spec.formats import E8M7, Format

CHUNK = 1 << 16  # elements: 256 KiB in float32, so that the dozen passes over a chunk find it in the L2 cache


def reference(
    x: Tensor, fmt: Format, seed: Seed | None = None, factor: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """Round `x` of any shape to the format, same shape and dtype, without coarse scale and rotation (`levels`).

    float64 is computed in float64, everything else in float32. `seed` is needed for stochastic rounding only. For a
    part of a larger tensor pass that tensor's NVFP4 `factor`, and `first_row`, the number of rows before it.
    """
    if fmt.scale == "none":
        return rounded_plainly(x, fmt)
    grouping = Grouping.of(x.shape, fmt)
    blocks = grouping.split(widened(x))
    uniform = None if seed is None else grouping.split(uniform_like(x, seed, first_row))
    return grouping.join(round_blocks(blocks, grouping.axes, fmt, uniform, factor, x.dtype)).to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return `x` in the dtype that the maths runs in: float32, or float64 where x already is."""
    return x if x.dtype == torch.float64 else x.float()


def uniform_like(x: Tensor, seed: Seed, first_row: int = 0) -> Tensor:
    """Return uniform numbers like x, drawn by row-major index, in the dtype that the maths runs in."""
    columns = columns_of(x)
    drawn = uniform_matrix(x.numel() // columns, columns, seed, x.device, first_row).view(x.shape)
    return drawn.double() if x.dtype == torch.float64 else drawn


def round_blocks(
    blocks: Tensor,
    axes: tuple[int, ...],
    fmt: Format,
    uniform: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Round blocks under one scale each; `axes` are the axes that a scale spans, `dtype` is the tensor's own."""
    magnitude = blocks.abs()
    scale = block_scale(magnitude, axes, fmt, dtype, factor)
    rounded = round_magnitude(magnitude.div_(scale), fmt.element, fmt.rounding, uniform)
    return rounded.mul_(scale).copysign_(blocks)


def block_scale(
    magnitude: Tensor, axes: tuple[int, ...], fmt: Format, dtype: torch.dtype, factor: Tensor | None = None
) -> Tensor:
    """Return the scale that every block is divided by, its axes of length one; NaN for a block that is not finite."""
    amax = magnitude.amax(axes, keepdim=True)
    stored, factor = stored_scales(magnitude, amax, axes, fmt, dtype, factor)
    return nan_where_not_finite(effective_scale(stored, factor, fmt, amax.dtype), amax)


def stored_scales(
    magnitude: Tensor,
    amax: Tensor,
    axes: tuple[int, ...],
    fmt: Format,
    dtype: torch.dtype,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return scales as a checkpoint holds them (E8M0 codes as integers, float8_e4m3fn, float32), and NVFP4's factor.

    `dtype` is that of the tensor, in which its packer computes.
    """
    if fmt.scale == "fp32":
        return fp32_scale(amax if fmt.calibrated is None else calibrated(amax, fmt), fmt.element), None
    if fmt.scale == "e4m3":
        factor = nvfp4_factor(amax, fmt) if factor is None else factor
        return nvfp4_blocks(amax, factor, fmt.element), factor
    codes = stepped_codes(amax, fmt, dtype) if stepped(fmt) else e8m0_codes(amax, fmt.scale_rule, fmt.element)
    if fmt.scale_rule == "mse":
        codes = least_error_codes(magnitude, [codes, codes + 1, codes - 1], axes, fmt, dtype)
    elif fmt.scale_rule == "fouroversix":  # the one that maps amax to 6, or that which maps it to 4
        codes = least_error_codes(magnitude, [codes, stepped_codes(amax, fmt, dtype, 4.0)], axes, fmt, dtype)
    return codes, None


def nvfp4_factor(amax: Tensor, fmt: Format) -> Tensor:
    """Return the FP32 factors above the block maxima `amax` [rows, blocks, 1]: one, or [rows, 1, 1] per token."""
    if fmt.factor == "static":
        amax = calibrated(amax, fmt)
    return nvfp4_global(amax, fmt.element, by_row=fmt.factor == "per_token")


def calibrated(amax: Tensor, fmt: Format) -> Tensor:
    """Return the largest magnitude that a calibration saw, [], like `amax`."""
    assert fmt.calibrated is not None
    return torch.full((), fmt.calibrated, dtype=amax.dtype, device=amax.device)


def effective_scale(stored: Tensor, factor: Tensor | None, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return the number that the elements are multiplied with, in the dtype that the maths runs in."""
    if fmt.scale == "e8m0":
        return power_of_two(stored, dtype)
    return stored.to(dtype) if factor is None else stored.to(dtype) / factor


def least_error_codes(
    magnitude: Tensor, candidates: list[Tensor], axes: tuple[int, ...], fmt: Format, dtype: torch.dtype
) -> Tensor:
    """Return of each block's candidates for its E8M0 code that of least squared error; the first on a tie.

    Errors are taken in units of the first candidate's scale, so that no square underflows, and added in float64; each
    step is rounded to the dtype of the rule's arithmetic, where it has one.
    """
    first, wide, rounded = candidates[0], magnitude.dtype, rounder(fmt, dtype)
    units = magnitude / power_of_two(first, wide)
    rounding = "nearest_even" if fmt.rounding == "stochastic" else fmt.rounding
    best, least = first, torch.full_like(first, torch.inf, dtype=torch.float64)
    for codes in candidates:
        ratio = power_of_two(codes - first + E8M0_BIAS, wide)
        made = round_magnitude(units / ratio, fmt.element, rounding) * ratio
        squares = rounded(rounded((made - units).double()).square())
        error = rounded(squares.sum(axes, keepdim=True))
        error = error.masked_fill((codes < 0) | (codes > E8M0_LARGEST), torch.inf)
        best = torch.where(error < least, codes, best)
        least = torch.minimum(error, least)
    return best


def rounded_plainly(x: Tensor, fmt: Format) -> Tensor:
    """Round `x` to the element itself, without a scale, as an IEEE cast does: overflow becomes infinity."""
    wide = widened(x)
    if wide.dtype == torch.float32 and fmt.element == E8M7:
        return wide.bfloat16().to(x.dtype)
    magnitude = wide.abs()
    overflow = (2 - 2.0 ** -(fmt.element.mantissa_bits + 1)) * 2.0**fmt.element.max_exponent  # rounds to 2 * 2^max
    rounded = round_magnitude(magnitude, fmt.element, "nearest_even")
    rounded = torch.where(magnitude >= overflow, torch.inf, rounded)
    return torch.where(magnitude.isnan(), magnitude, rounded).copysign(wide)


def round_chunked(x: Tensor, fmt: Format, seed: Seed | None, out: Tensor) -> Tensor:
    """Write `reference(x, fmt, seed)` into `out`, which may be x itself; both contiguous."""
    if fmt.block is None and fmt.factor == "tensor":
        return out.copy_(reference(x, fmt, seed))
    height, columns = (fmt.block or (1, 1))[0], columns_of(x)
    factor = None
    if fmt.scale == "e4m3" and fmt.factor in ("tensor", "fused"):
        maxima = [_block_maxima(piece, fmt) for piece, _ in _pieces(x.view(-1, columns), x, height)]
        factor = nvfp4_global(torch.cat(maxima), fmt.element)
    target = out.view(-1, columns)
    for piece, first_row in _pieces(x.view(-1, columns), x, height):
        target[first_row : first_row + len(piece)] = reference(piece, fmt, seed, factor, first_row)
    return out


def _block_maxima(piece: Tensor, fmt: Format) -> Tensor:
    grouping = Grouping.of(piece.shape, fmt)
    return grouping.split(widened(piece)).abs().amax(grouping.axes).flatten()


def _pieces(rows: Tensor, x: Tensor, height: int) -> Iterator[tuple[Tensor, int]]:
    """Yield pieces of whole bands of `height` rows, none across two matrices of x, with their first row's number."""
    per_matrix = x.shape[-2] if x.ndim > 1 and height > 1 else len(rows)
    size = max(1, CHUNK // (rows.shape[1] * height)) * height
    for matrix in range(0, len(rows), per_matrix):
        for first_row in range(matrix, matrix + per_matrix, size):
            yield rows[first_row : min(first_row + size, matrix + per_matrix)], first_row
