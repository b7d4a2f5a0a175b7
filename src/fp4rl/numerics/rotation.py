"""Rotation: an orthonormal Hadamard transform in blocks along the last axis, which spreads an outlier over its block.

A linear layer's product stays what it was when weight and input turn alike, (W H)(H x) = W x, since H is symmetric
and its own inverse. A tail of the last axis too short for a block stays as it is, which keeps the whole
orthonormal.
"""

import torch
from torch import Tensor

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import ROTATIONS


def rotate(x: Tensor, size: int) -> Tensor:
    """`x` [..., n] with every `size` neighbours of the last axis transformed; float32 or float64, same shape.

    A fast Walsh-Hadamard transform: log2(size) sums and differences in a fixed order, one scaling by 1/sqrt(size).
    Raises InvalidValueError for a size that is not 16, 32, 64 or 128.
    """
    if size not in ROTATIONS:
        raise InvalidValueError(f"rotation {size} is not one of {', '.join(map(str, ROTATIONS))}")
    length = x.shape[-1] // size * size if x.ndim else 0
    turned = x[..., :length].reshape(-1, size)
    step = size // 2
    while step:
        pairs = turned.view(-1, size // (2 * step), 2, step)
        turned = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(-1, size)
        step //= 2
    result = x.clone()
    if length:
        result[..., :length] = (turned * size**-0.5).view(*x.shape[:-1], length)
    return result


def rotate_back(x: Tensor, size: int) -> Tensor:
    """The inverse of `rotate`, up to float rounding: a Hadamard block is its own inverse."""
    return rotate(x, size)
