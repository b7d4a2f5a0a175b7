"""A tensor as the blocks that share a scale: views for the values, and axes of length one where a scale broadcasts.

A matrix [rows, columns] with blocks (r, c) becomes [rows/r, r, columns/c, c]; reducing over `axes` leaves [rows/r, 1,
columns/c, 1], which broadcasts back. One-row blocks drop the axis of length one: [rows, columns/c, c]. A last axis that
does not divide is padded with zeros, which change neither a block's largest magnitude nor its squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4rl.spec.formats import Format

Block = tuple[int, int] | None


def columns_of(x: Tensor) -> int:
    """Return the length of the last axis, 1 for a scalar."""
    return x.shape[-1] if x.ndim else 1


@dataclass(frozen=True)
class Grouping:
    """How one tensor divides into blocks; `split` and `join` are each other's inverse."""

    shape: torch.Size
    block: Block

    @classmethod
    def of(cls, shape: torch.Size, fmt: Format) -> "Grouping":
        """Return the blocks of a format: whole rows where tokens share no FP32 scale."""
        rowwise = fmt.block is None and fmt.factor != "tensor"
        return cls(shape, (1, max(1, (1, *shape)[-1])) if rowwise else fmt.block)

    @property
    def matrix(self) -> tuple[int, int]:
        """Lengths of the last two axes, 1 where there is none."""
        rows, columns = (1, 1, *self.shape)[-2:]
        return rows, columns

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a split tensor that one scale spans."""
        return (-1,) if self.block is None or self.block[0] == 1 else (-3, -1)

    @property
    def shape_of_scales(self) -> tuple[int, ...]:
        """[..., row blocks, column blocks]: one number a block, below the tensor's own leading axes."""
        if self.block is None:
            return ()
        down, across = self._blocks(self.block)
        return (*self.shape[:-1], across) if self.block[0] == 1 else (*self.shape[:-2], down, across)

    def split(self, x: Tensor) -> Tensor:
        """Return the blocks of [..., rows, columns], padded with zeros; a view where nothing is padded."""
        if self.block is None:
            return x.reshape(-1)
        (r, c), (rows, columns) = self.block, self.matrix
        down, across = self._blocks(self.block)
        below, right = down * r - rows, across * c - columns
        if r == 1:
            x = x.reshape(-1, columns)
            return (pad(x, (0, right)) if right else x).view(-1, across, c)
        x = x.reshape(-1, rows, columns)
        return (pad(x, (0, right, 0, below)) if below or right else x).view(-1, down, r, across, c)

    def join(self, blocks: Tensor) -> Tensor:
        """Return blocks in the tensor's own shape, the padding cut off."""
        if self.block is None:
            return blocks.view(self.shape)
        (r, c), (rows, columns) = self.block, self.matrix
        down, across = self._blocks(self.block)
        if r == 1:
            return blocks.view(-1, across * c)[:, :columns].contiguous().view(self.shape)
        return blocks.view(-1, down * r, across * c)[:, :rows, :columns].contiguous().view(self.shape)

    def scales_outside(self, scales: Tensor) -> Tensor:
        """Return scales that broadcast over blocks as `shape_of_scales`: the form in which they are stored."""
        return scales.reshape(self.shape_of_scales)

    def scales_inside(self, scales: Tensor) -> Tensor:
        """Return the inverse of `scales_outside`: scales that broadcast over split blocks."""
        if self.block is None:
            return scales.reshape(1)
        down, across = self._blocks(self.block)
        return scales.reshape((-1, across, 1) if self.block[0] == 1 else (-1, down, 1, across, 1))

    def _blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        """Return how many blocks a matrix has below one another and side by side; the last ones may be short."""
        rows, columns = self.matrix
        return -(-rows // block[0]), -(-columns // block[1])
