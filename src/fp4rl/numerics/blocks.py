"""A tensor seen as the blocks that share a scale: views for the values, one kept axis of length one for the scales.

A matrix [rows, columns] with blocks (r, c) becomes [rows/r, r, columns/c, c]; reducing over `axes` leaves [rows/r,
1, columns/c, 1], which broadcasts back. One-row blocks drop the axis of length one: [rows, columns/c, c]. A last
axis that does not divide is padded with zeros, which change neither a block's largest magnitude nor its squared
error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Block = tuple[int, int] | None


def columns_of(x: Tensor) -> int:
    """Length of the last axis, 1 for a scalar."""
    return x.shape[-1] if x.ndim else 1


@dataclass(frozen=True)
class Grouping:
    """How one tensor falls into blocks: its matrix shape, and the block's shape. `split` and `join` are inverse."""

    shape: torch.Size
    block: Block

    @property
    def columns(self) -> int:
        """Length of the last axis (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Length of the axis before the last (1 for a vector)."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a split tensor that one scale spans."""
        if self.block is None:
            return (-1,)
        return (-1,) if self.block[0] == 1 else (-3, -1)

    @property
    def shape_of_scales(self) -> tuple[int, ...]:
        """One number a block, in the tensor's own leading axes."""
        if self.block is None:
            return ()
        across = -(-self.columns // self.block[1])
        if self.block[0] == 1:
            return (*self.shape[:-1], across)
        return (*self.shape[:-2], -(-self.rows // self.block[0]), across)

    def split(self, x: Tensor) -> Tensor:
        """[..., rows, columns] -> blocks, zeros where an axis does not divide; a view where nothing is padded."""
        if self.block is None:
            return x.reshape(-1)
        r, c = self.block
        if r == 1:
            x = x.reshape(-1, self.columns)
            missing = -self.columns % c
            x = pad(x, (0, missing)) if missing else x
            return x.view(-1, (self.columns + missing) // c, c)
        x = x.reshape(-1, self.rows, self.columns)
        below, right = -self.rows % r, -self.columns % c
        x = pad(x, (0, right, 0, below)) if below or right else x
        return x.view(-1, (self.rows + below) // r, r, (self.columns + right) // c, c)

    def join(self, blocks: Tensor) -> Tensor:
        """Blocks -> the tensor's own shape, the padding cut off."""
        if self.block is None:
            return blocks.view(self.shape)
        r, c = self.block
        if r == 1:
            padded = blocks.view(-1, self.columns + -self.columns % c)
            return padded[:, : self.columns].contiguous().view(self.shape)
        padded = blocks.view(-1, self.rows + -self.rows % r, self.columns + -self.columns % c)
        return padded[:, : self.rows, : self.columns].contiguous().view(self.shape)

    def scales_outside(self, scales: Tensor) -> Tensor:
        """Scales that broadcast over blocks -> one number a block, in the tensor's own leading axes."""
        return scales.reshape(self.shape_of_scales)

    def scales_inside(self, scales: Tensor) -> Tensor:
        """The inverse of `scales_outside`: scales that broadcast over split blocks."""
        if self.block is None:
            return scales.reshape(1)
        across = -(-self.columns // self.block[1])
        if self.block[0] == 1:
            return scales.reshape(-1, across, 1)
        return scales.reshape(-1, -(-self.rows // self.block[0]), 1, across, 1)
