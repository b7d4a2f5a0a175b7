"""The compiled backend: the reference's formula in the form that torch.compile turns into one pass over memory.

One core for each format and dtype, compiled on the view of blocks with dynamic axes, so that one compilation serves
every shape: `dynamic=True` on the matrix itself would make the block size symbolic, which is several times slower.
The result is written straight into `out`; first-touch page faults of a fresh output cost more than the arithmetic.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.scales import (
    e8m0_codes,
    nan_where_not_finite,
    nvfp4_blocks,
    nvfp4_global,
    power_of_two,
)
from fp4rl.spec.formats import Element, Format

Core = Callable[[Tensor, Tensor, Tensor | None], None]


def supports(x: Tensor, fmt: Format) -> bool:
    """Nearest-even formats in blocks; on CUDA only those whose scale is a power of two, since division is
    approximate there."""
    exact = fmt.scale == "e8m0" or (fmt.scale == "e4m3" and x.device.type == "cpu")
    return exact and fmt.rounding == "nearest_even" and fmt.scale_rule != "mse" and x.dtype != torch.float64


def round_compiled(x: Tensor, fmt: Format, out: Tensor) -> Tensor:
    """`reference(x, fmt)` written into `out`, which may be x itself; both contiguous. The first call of a kind
    compiles."""
    grouping = Grouping(x.shape, fmt.block)
    blocks = grouping.split(x)
    whole = blocks.data_ptr() == x.data_ptr()  # nothing was padded
    target = grouping.split(out) if whole else torch.empty_like(blocks)
    factor = nvfp4_global(blocks.abs().amax(grouping.axes).float(), fmt.element) if fmt.scale == "e4m3" else None
    source, result = (_counted(tensor, len(grouping.axes)) for tensor in (blocks, target))
    _core(fmt, x.dtype, grouping.axes)(source, result, factor)
    return out if whole else out.copy_(grouping.join(target))


def _counted(blocks: Tensor, axes: int) -> Tensor:
    """[n, width] or [bands, height, n, width] with the numbers of blocks marked as free."""
    view = blocks.view(-1, *(blocks.shape[-1:] if axes == 1 else blocks.shape[-3:]))
    for axis in range(0, view.ndim, 2):
        torch._dynamo.maybe_mark_dynamic(view, axis)
    return view


@cache
def _core(fmt: Format, dtype: torch.dtype, axes: tuple[int, ...]) -> Core:
    def core(blocks: Tensor, out: Tensor, factor: Tensor | None) -> None:
        magnitude = blocks.float().abs()
        amax = magnitude.amax(axes, keepdim=True)
        if factor is None:
            codes = e8m0_codes(amax, fmt.scale_rule, fmt.element)
            scaled = magnitude * power_of_two(254 - codes, torch.float32)
            scale = power_of_two(codes, torch.float32)
        else:
            scale = nvfp4_blocks(amax, factor, fmt.element).float() / factor
            scaled = magnitude / scale
        scaled = scaled.clamp(max=fmt.element.largest)
        magic = _by_compares(scaled, fmt.element) if dtype == torch.bfloat16 else _by_bits(scaled, fmt.element)
        rounded = ((scaled + magic) - magic) * nan_where_not_finite(scale, amax)
        out.copy_(torch.copysign(rounded, blocks.float()))

    # The limit on recompilations counts by code object, and all these closures would share one.
    own = FunctionType(core.__code__.replace(), core.__globals__, core.__name__, None, core.__closure__)
    return torch.compile(own, fullgraph=True)


def _by_bits(magnitude: Tensor, element: Element) -> Tensor:
    """The power of two whose addition rounds each magnitude to the grid: 2^23 spacings."""
    least = (127 + element.min_exponent) << 23
    binade = (magnitude.view(torch.int32) & 0x7F800000).clamp(min=least)
    return (binade + ((23 - element.mantissa_bits) << 23)).view(torch.float32)


def _by_compares(magnitude: Tensor, element: Element) -> Tensor:
    """The same by one comparison for each binade: looking at bits costs twice as much where vectors hold bfloat16."""
    magic = torch.full((), 2.0 ** (23 - element.mantissa_bits + element.max_exponent), device=magnitude.device)
    for exponent in range(element.max_exponent, element.min_exponent, -1):
        below = 2.0 ** (23 - element.mantissa_bits + exponent - 1)
        magic = torch.where(magnitude < 2.0**exponent, below, magic)
    return magic
