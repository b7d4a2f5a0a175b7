"""Values on which quantizers go wrong: on and beside every rounding and scale boundary, at every exponent, and random.

Everything is drawn from one generator, so that a run can be repeated, and scaled in float64 by powers of two, so that a
value meant to stand on a boundary stands there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4rl.numerics.scales import nvfp4_blocks, nvfp4_global
from fp4rl.spec.formats import E2M1, E4M3, Element

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LOWEST = {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}
HIGHEST = {torch.float32: 127, torch.bfloat16: 127, torch.float16: 15}
# Where one rule or another raises the scale: mantissas of a block's largest magnitude.
RULE_EDGES = (1.0, 1.25, 1.5, 1.75, 1.8125, 1.875, 1.9375)
NVFP4_SIZES = (2.0**-100, 2.0**-60, 0.02, 1.0, 2.0**60, 2.0**110)

Chunks = Iterator[tuple[str, Tensor]]


def mx_values(element: Element, dtype: torch.dtype, millions: float, width: int = 32) -> Chunks:
    """(kind, blocks [n, width]) of finite values, `millions` of them or a few more in all."""
    generator = torch.Generator().manual_seed(11)
    tenth = -(-int(millions * 1e5) // width)
    yield "gaussian", _normal(generator, 2 * tenth, width).mul(0.02).to(dtype)
    yield "student", (_normal(generator, 2 * tenth, width) / _root_of_squares(generator, 2 * tenth, width)).to(dtype)
    yield "log-uniform", _log_uniform(generator, 2 * tenth, width, dtype)
    yield "any bits", _any_bits(generator, tenth, width, dtype)
    yield "boundaries", _boundaries(generator, 2 * tenth, width, element, dtype)
    yield "outlier", _outlier(generator, tenth, width, dtype)


def every_bfloat16(exponents: range, width: int = 32) -> Tensor:
    """Blocks that pair every bfloat16 maximum with every bfloat16 magnitude of its own and the nine binades below."""
    mantissas = 1 + torch.arange(128) / 128
    below = (mantissas[None, :] * torch.exp2(-torch.arange(10.0))[:, None]).flatten()
    below = torch.nn.functional.pad(below, (0, -len(below) % (width - 1))).view(-1, width - 1)
    rows = torch.cat(
        (mantissas[:, None, None].expand(-1, len(below), 1), below.expand(128, -1, -1)), -1
    )  # [maximum, run, width]
    rows = torch.minimum(rows, rows[..., :1]).view(-1, width).double()
    scaled = rows * torch.exp2(torch.tensor(exponents, dtype=torch.float64))[:, None, None]
    return scaled.view(-1, width).to(torch.bfloat16)


def nvfp4_values(dtype: torch.dtype, millions: float) -> Chunks:
    """(kind, tensor [n, 16]): each is a tensor of its own, whose FP32 factor comes from its largest value."""
    generator = torch.Generator().manual_seed(12)
    n = -(-int(millions * 1e6) // (16 * (len(NVFP4_SIZES) + 5)))
    yield "gaussian", _normal(generator, n, 16).mul(0.02).to(dtype)
    yield "student", (_normal(generator, n, 16) / _root_of_squares(generator, n, 16)).to(dtype)
    for size in NVFP4_SIZES:
        spread = torch.exp2(-18 * torch.rand(n, 1, generator=generator)) * size
        yield f"spread, size {size:g}", (_normal(generator, n, 16) * spread).to(dtype)
    yield "scale boundaries", _nvfp4_scale_boundaries(generator, n, dtype)
    yield "rounding boundaries", _nvfp4_rounding_boundaries(generator, n, dtype)
    yield "ties", _nvfp4_ties(generator, n, dtype)


def beside(values: Tensor) -> Tensor:
    """The values with their neighbours an ulp below and above."""
    bits = values.view(BITS[values.dtype])
    return torch.cat((values, (bits - 1).view(values.dtype), (bits + 1).view(values.dtype)))


def midpoints(element: Element) -> Tensor:
    """Where rounding to nearest has a tie."""
    grid = torch.tensor(element.grid())
    return (grid[1:] + grid[:-1]) / 2


def _normal(generator: torch.Generator, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=generator)


def _root_of_squares(generator: torch.Generator, rows: int, width: int) -> Tensor:
    return sum(_normal(generator, rows, width).square() for _ in range(3)).div(3).sqrt()


def _signed(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, -x, x)


def _log_uniform(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Each block's top anywhere in the range, its values up to eight binades below; zeros of both signs among them."""
    top = torch.randint(LOWEST[dtype], HIGHEST[dtype] + 1, (rows, 1), generator=generator)
    drop = 8 * torch.rand(rows, width, generator=generator)
    x = torch.exp2(top.double() - drop).to(dtype)
    return _signed(torch.where(torch.rand(rows, width, generator=generator) < 0.02, 0.0, x), generator)


def _any_bits(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    half = 1 << (8 * dtype.itemsize - 1)
    x = torch.randint(-half, half, (rows, width), generator=generator).to(BITS[dtype]).view(dtype)
    return torch.where(x.isfinite(), x, 1.0)


def _boundaries(generator: torch.Generator, rows: int, width: int, element: Element, dtype: torch.dtype) -> Tensor:
    """Grid values and ties under a maximum that sits on or beside a rule's edge, at every exponent."""
    values = beside(torch.cat((torch.tensor(element.grid()[1:]), midpoints(element))).to(dtype))
    tops = beside((torch.tensor(RULE_EDGES) * 2.0**element.max_exponent).to(dtype))
    x = values[torch.randint(len(values), (rows, width), generator=generator)]
    x[:, 0] = tops[torch.randint(len(tops), (rows,), generator=generator)]
    x = torch.minimum(x, x[:, :1]).double()
    lowest, highest = LOWEST[dtype] - element.max_exponent, HIGHEST[dtype] - element.max_exponent
    shift = torch.randint(lowest, highest + 1, (rows, 1), generator=generator)
    made = (x * torch.exp2(shift.double())).to(dtype)
    return _signed(torch.where(made.isfinite(), made, torch.finfo(dtype).max), generator)


def _outlier(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    x = 1e-3 * _normal(generator, rows, width)
    x[:, 3] = 3e4 * torch.rand(rows, generator=generator)
    return x.to(dtype)


def _nvfp4_scale_boundaries(generator: torch.Generator, rows: int, dtype: torch.dtype) -> Tensor:
    """Block maxima whose E4M3 scale is about to round the other way."""
    points = torch.cat((midpoints(E4M3), torch.tensor(E4M3.grid()[1:])))
    factor = nvfp4_global(torch.tensor([5.0]), E2M1)
    wanted = points[torch.randint(len(points), (rows,), generator=generator)] * 6 / factor
    nudged = wanted.view(torch.int32) + torch.randint(-2, 3, (rows,), generator=generator).int()
    x = torch.rand(rows, 16, generator=generator) * 0.99 * wanted[:, None]
    x[:, 0] = nudged.view(torch.float32).clamp(max=5.0)
    x[0, 0] = 5.0
    return _signed(x.to(dtype), generator)


def _nvfp4_rounding_boundaries(generator: torch.Generator, rows: int, dtype: torch.dtype) -> Tensor:
    """Values that stand, divided by their block's scale, on a tie of E2M1 or an ulp beside it."""
    x = (_normal(generator, rows, 16).abs() * torch.exp2(-12 * torch.rand(rows, 1, generator=generator))).to(dtype)
    x = x.float()
    amax = x.amax(-1, keepdim=True)
    factor = nvfp4_global(amax, E2M1)
    scale = nvfp4_blocks(amax, factor, E2M1).float() / factor
    ties = midpoints(E2M1)
    at = ties[torch.randint(len(ties), (rows, 16), generator=generator)] * scale
    at = (at.view(torch.int32) + torch.randint(-1, 2, at.shape, generator=generator).int()).view(torch.float32)
    return _signed(torch.where((at < amax) & (x < amax), at, x).to(dtype), generator)


def _nvfp4_ties(generator: torch.Generator, rows: int, dtype: torch.dtype) -> Tensor:
    """Exact ties under block scales that are powers of two, in a tensor whose factor is one."""
    values = torch.cat((midpoints(E2M1), torch.tensor(E2M1.grid())))
    x = values[torch.randint(len(values), (rows, 16), generator=generator)]
    x[:, 0] = 6.0
    x *= torch.exp2(torch.randint(-6, 9, (rows, 1), generator=generator).float())
    x[0, 0] = 448.0 * 6.0
    return _signed(x.to(dtype), generator)
