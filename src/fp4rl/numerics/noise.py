"""Uniform numbers from a counter: a hash of the element's index under a seed, the same on every backend and for
every chunk.

The mixer is the 32-bit finaliser of xor-shifts and multiplications by C. Wellons ("Prospecting for hash functions",
lowbias32), with the second half of a 64-bit seed added between the rounds. Generating with torch costs several
times the rounding itself.
"""

import torch
from torch import Tensor

Seed = tuple[int, int]  # two int32 halves

FIRST = 0x7FEB352D
SECOND = 0x846CA68B - (1 << 32)  # as int32
TO_UNIT = 2.0**-24


def draw_seed(generator: torch.Generator) -> Seed:
    """A seed from the generator, which moves on; the tensor's values never touch the generator again."""
    pair = torch.randint(-(2**31), 2**31, (2,), generator=generator, device=generator.device, dtype=torch.int64)
    first, second = pair.tolist()
    return first, second


def uniform_at(index: Tensor, seed: Seed) -> Tensor:
    """Uniform float32 in [0, 1), a multiple of 2^-24, for each int32 index (taken modulo 2^32)."""
    x = index ^ seed[0]
    x = (x ^ _shifted(x, 16)) * FIRST + seed[1]
    x = (x ^ _shifted(x, 15)) * SECOND
    return _shifted(x ^ _shifted(x, 16), 8).to(torch.float32) * TO_UNIT


def _shifted(x: Tensor, bits: int) -> Tensor:
    # Torch shifts int32 arithmetically; the mask takes the copies of the sign off.
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def uniform_matrix(rows: int, columns: int, seed: Seed, device: torch.device, first_row: int = 0) -> Tensor:
    """[rows, columns] float32 for the elements of a matrix counted row by row, from row `first_row` on."""
    start = torch.arange(first_row, first_row + rows, device=device, dtype=torch.int64).mul_(columns)
    start = start.bitwise_and_(0xFFFFFFFF).to(torch.int32)  # wraps, as the index does on every backend
    return uniform_at(start[:, None] + torch.arange(columns, device=device, dtype=torch.int32), seed)
