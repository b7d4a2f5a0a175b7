"""What is done around the rounding of blocks: a rotation, and inside it a coarse scale. Both are undone afterwards.

Rotation: an orthonormal Hadamard transform in blocks along the last axis, which spreads an outlier over its block.
A linear layer's product stays the same when weight and input are both rotated, (W H)(H x) = W x: H is symmetric and
its own inverse. A tail of the last axis too short for a block stays as it is, which keeps the whole orthonormal.

Coarse scale: one FP32 scale for a long run of columns, above the blocks' powers of two, which miss a block's ideal
scale by up to a factor of two. Sources: Ascend's dual-level cast (CANN aclnnDynamicDualLevelMxQuant: runs of 512, the
largest magnitude divided by 6, the quotient kept in the input's dtype), macro-block scaling by 128 (arXiv 2603.08713).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.fallback import falling_back, remainder
from fp4rl.numerics.reference import block_scale, reference, widened
from fp4rl.numerics.rounding import round_magnitude, spacing
from fp4rl.numerics.scales import FP32_LARGEST, FP32_TINY, divided
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import ROTATIONS, Coarse, Format

IN_CACHE = 2**17  # values that are turned at a time on a CPU
FRACTIONS = 16  # steps within one power of two; the E8M0 scales below a coarse scale cover all other factors


@dataclass(frozen=True, eq=False)
class Levels:
    """How to undo rotation and coarse scale; `coarse` [rows, runs, 1] where the format has one."""

    fmt: Format
    dtype: torch.dtype
    coarse: Tensor | None = None

    def outside(self, inner: Tensor) -> Tensor:
        """Return rounded inner values in the tensor's own dtype and basis."""
        if self.coarse is not None and self.fmt.coarse is not None:
            runs = Grouping(inner.shape, (1, self.fmt.coarse.columns))
            inner = runs.join(runs.split(widened(inner)) * self.coarse)
        # A Hadamard block is its own inverse, up to float rounding.
        return (rotate(inner, self.fmt.rotation) if self.fmt.rotation else inner).to(self.dtype)


def inside(x: Tensor, fmt: Format) -> tuple[Tensor, Levels]:
    """Return the values that the blocks round, and how to undo it. A format without levels returns x itself.

    A coarse quotient is cast to x's dtype, as Ascend's dual-level operation does, and kept under scale_math float32,
    as msModelSlim does.
    """
    if fmt.rotation is None and fmt.coarse is None:
        return x, Levels(fmt, x.dtype)
    wide = widened(x).contiguous()
    if fmt.rotation:
        wide = rotate(wide, fmt.rotation)
    if fmt.coarse is None:
        return wide, Levels(fmt, x.dtype)
    coarse = coarse_scale(wide, fmt, fmt.coarse)
    runs = Grouping(wide.shape, (1, fmt.coarse.columns))
    quotient = runs.join(runs.split(wide) / coarse)
    kept = quotient if fmt.scale_math == "float32" else quotient.to(x.dtype)
    return kept, Levels(fmt, x.dtype, coarse)


def within_reach(x: Tensor, fmt: Format) -> Tensor:
    """Return a bool like x, rotated where the format is: whether each magnitude is within what its scale can hold.

    Of a value that is rounded twice, whether it is, or what the first rounding left: clipped is what both clip.
    """
    if fmt.scale == "none":
        return x.abs() <= fmt.element.largest
    if fmt.fallback is not None:
        once, chosen = replace(fmt, fallback=None), falling_back(x, fmt)
        inner, around = inside(x, once)
        rest = remainder(x, around.outside(reference(inner, once)), chosen)
        return within_reach(x, once) | (chosen & within_reach(rest, once))
    inner, _ = inside(x, fmt)
    grouping = Grouping.of(x.shape, fmt)
    magnitude = grouping.split(widened(inner)).abs()
    return grouping.join(magnitude <= block_scale(magnitude, grouping.axes, fmt, inner.dtype) * fmt.element.largest)


def levels(x: Tensor, fmt: Format, anchor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the signed element value that each value of `x` is rounded to, and the scale that it is multiplied by.

    Both like x, in float32 or float64; inside rotation and coarse scale. The format has scales, draws nothing and has
    no fallback. With an `anchor` like x each value goes to that of its two neighbouring levels which is nearer the
    anchor, on a tie as the format rounds (Q-EMA, arXiv 2502.20853, for a format without rotation or coarse scale); what
    lies on a level stays.
    """
    inner, _ = inside(x, fmt)
    grouping = Grouping.of(x.shape, fmt)
    blocks = grouping.split(widened(inner))
    magnitude = blocks.abs()
    scale = block_scale(magnitude, grouping.axes, fmt, inner.dtype)
    magnitude.div_(scale)
    if anchor is None:
        level = round_magnitude(magnitude, fmt.element, fmt.rounding)
    else:
        low = round_magnitude(magnitude, fmt.element, "toward_zero")
        high = torch.where(low < magnitude, low + spacing(low, fmt.element), low).clamp_(max=fmt.element.largest)
        wanted = grouping.split(anchor.to(blocks.dtype)) * blocks.sign() / scale
        level = round_magnitude(wanted.clamp(low, high), fmt.element, fmt.rounding)
    level = level.copysign_(blocks)
    return grouping.join(level), grouping.join(scale.expand_as(blocks).contiguous())


def smooth_slope(x: Tensor, fmt: Format, sharpness: float, cap: float) -> Tensor:
    """Return a derivative of rounding `x`, like it in float32 or float64: |2t - 1|^(1/sharpness - 1) / sharpness, at
    most `cap`, where a magnitude is t of the way between two neighbouring levels, and 0 beyond the largest.

    Scales count as constants. DGE of arXiv 2501.17116, eq. 8; formats that are not rotated and have no fallback.
    """
    inner, _ = inside(x, fmt)
    grouping = Grouping.of(x.shape, fmt)
    units = grouping.split(widened(inner)).abs()
    units.div_(block_scale(units, grouping.axes, fmt, inner.dtype))
    step = spacing(units.clamp(max=fmt.element.largest), fmt.element)
    beyond = units > fmt.element.largest * (1 + 2.0**-20)  # not what one rounding of an NVFP4 scale puts there
    units.remainder_(step).div_(step)  # t: a level is a multiple of the step above it
    slope = units.mul_(2).sub_(1).abs_().pow_(1 / sharpness - 1).div_(sharpness).clamp_(max=cap)
    return grouping.join(slope.masked_fill_(beyond, 0))


def rotate(x: Tensor, size: int) -> Tensor:
    """Rotate every `size` neighbours along the last axis of `x` [..., n]; float32 or float64, same shape.

    Raises InvalidValueError for a size that is not 16, 32, 64 or 128.
    """
    if size not in ROTATIONS:
        raise InvalidValueError(f"rotation {size} is not one of {', '.join(map(str, ROTATIONS))}")
    length = x.shape[-1] // size * size if x.ndim else 0
    result = x.clone()
    if length:
        result[..., :length] = hadamard(x[..., :length].reshape(-1, size)).view(*x.shape[:-1], length)
    return result


def hadamard(x: Tensor) -> Tensor:
    """Return the rows of `x` [rows, size], size a power of two, times Sylvester's Hadamard matrix over sqrt(size).

    A fast Walsh-Hadamard transform: log2(size) sums and differences in a fixed order, one scaling by 1/sqrt(size).
    """
    if x.device.type != "cpu" or x.numel() <= IN_CACHE or torch.compiler.is_compiling():
        return _hadamard(x)
    return torch.cat([_hadamard(part) for part in torch.split(x, max(1, IN_CACHE // x.shape[-1]))])


def _hadamard(x: Tensor) -> Tensor:
    size = x.shape[-1]
    turned, step = x, size // 2
    while step:
        pairs = turned.view(-1, size // (2 * step), 2, step)
        turned = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(-1, size)
        step //= 2
    return turned * float(size**-0.5)


def coarse_scale(x: Tensor, fmt: Format, coarse: Coarse) -> Tensor:
    """Return the scale of every run of columns, [rows, runs, 1], positive and finite; `x` [..., columns].

    `max` maps the run's largest finite magnitude to the element's largest, exactly as Ascend does. `search` divides
    that scale by 2^(i/16), i = 0..15, and keeps the first of least squared error.
    """
    runs = Grouping(x.shape, (1, coarse.columns)).split(x)
    runs = runs.masked_fill(~runs.isfinite(), 0)
    top = divided(runs.abs().amax(-1, keepdim=True), fmt.element.largest).clamp(FP32_TINY, FP32_LARGEST).float()
    return top.to(x.dtype) if coarse.choice == "max" else _of_least_error(runs, top, fmt).to(x.dtype)


def _of_least_error(runs: Tensor, top: Tensor, fmt: Format) -> Tensor:
    rounding = "nearest_even" if fmt.rounding == "stochastic" else fmt.rounding
    inner = replace(fmt, coarse=None, rotation=None, rounding=rounding)
    best, least = top, torch.full_like(top, torch.inf, dtype=torch.float64)
    for i in range(FRACTIONS):
        scale = top * 2.0 ** (-i / FRACTIONS)
        error = (reference(runs / scale, inner) * scale - runs).double() / top
        error = error.square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return best
