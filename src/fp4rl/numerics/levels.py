"""What stands around the blocks: a rotation, and inside it a coarse scale. Both are undone after the rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4rl.numerics.coarse import coarse_scale, divided_by_coarse, multiplied_by_coarse
from fp4rl.numerics.reference import widened
from fp4rl.numerics.rotation import rotate, rotate_back
from fp4rl.spec.formats import Format


@dataclass(frozen=True, eq=False)
class Levels:
    """How to come back from the values that the blocks round: the coarse scales [rows, runs, 1] where there are any."""

    fmt: Format
    dtype: torch.dtype
    coarse: Tensor | None = None

    def outside(self, inner: Tensor) -> Tensor:
        """Rounded inner values -> values of the tensor's own dtype and basis."""
        if self.coarse is not None and self.fmt.coarse is not None:
            inner = multiplied_by_coarse(widened(inner), self.coarse, self.fmt.coarse)
        return (rotate_back(inner, self.fmt.rotation) if self.fmt.rotation else inner).to(self.dtype)


def inside(x: Tensor, fmt: Format) -> tuple[Tensor, Levels]:
    """The values that the blocks round, and the way back. A format without levels hands x itself through.

    A coarse quotient is cast to x's dtype, as Ascend's dual-level operation does.
    """
    if fmt.rotation is None and fmt.coarse is None:
        return x, Levels(fmt, x.dtype)
    wide = widened(x).contiguous()
    if fmt.rotation:
        wide = rotate(wide, fmt.rotation)
    if fmt.coarse is None:
        return wide, Levels(fmt, x.dtype)
    coarse = coarse_scale(wide, fmt, fmt.coarse)
    return divided_by_coarse(wide, coarse, fmt.coarse).to(x.dtype), Levels(fmt, x.dtype, coarse)
