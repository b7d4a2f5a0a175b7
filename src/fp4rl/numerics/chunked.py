"""The reference in pieces that stay in the cache, written into one output: several times faster, and needs no
compiler."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping, columns_of
from fp4rl.numerics.noise import Seed
from fp4rl.numerics.reference import reference, widened
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.formats import Format

CHUNK = 1 << 16  # elements: 256 KiB in float32, so that a dozen passes over a chunk meet the second-level cache


def round_chunked(x: Tensor, fmt: Format, seed: Seed | None, out: Tensor) -> Tensor:
    """`reference(x, fmt, seed)` written into `out`, which may be x itself; both contiguous."""
    if fmt.block is None:
        return out.copy_(reference(x, fmt, seed))
    height, columns = fmt.block[0], columns_of(x)
    factor = None
    if fmt.scale == "e4m3":
        maxima = [_block_maxima(piece, fmt) for piece, _ in _pieces(x.view(-1, columns), x, height)]
        factor = nvfp4_global(torch.cat(maxima), fmt.element)
    target = out.view(-1, columns)
    for piece, first_row in _pieces(x.view(-1, columns), x, height):
        target[first_row : first_row + len(piece)] = reference(piece, fmt, seed, factor, first_row)
    return out


def _block_maxima(piece: Tensor, fmt: Format) -> Tensor:
    grouping = Grouping(piece.shape, fmt.block)
    return grouping.split(widened(piece)).abs().amax(grouping.axes).flatten()


def _pieces(rows: Tensor, x: Tensor, height: int) -> Iterator[tuple[Tensor, int]]:
    """Runs of whole bands of `height` rows, none across two matrices of x, each with its first row's number."""
    per_matrix = x.shape[-2] if x.ndim > 1 and height > 1 else len(rows)
    size = max(1, CHUNK // (rows.shape[1] * height)) * height
    for matrix in range(0, len(rows), per_matrix):
        for first_row in range(matrix, matrix + per_matrix, size):
            yield rows[first_row : min(first_row + size, matrix + per_matrix)], first_row
