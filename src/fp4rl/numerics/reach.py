"""Which values their block's scale can hold without clipping them."""

from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.levels import inside
from fp4rl.numerics.reference import block_scale, widened
from fp4rl.spec.formats import Format


def within_reach(x: Tensor, fmt: Format) -> Tensor:
    """Bool like x: whether the magnitude lies within the element's largest times its block's scale.

    For a rotated format the places are those of the rotated tensor.
    """
    if fmt.scale == "none":
        return x.abs() <= fmt.element.largest
    inner, _ = inside(x, fmt)
    grouping = Grouping(x.shape, fmt.block)
    magnitude = grouping.split(widened(inner)).abs()
    return grouping.join(magnitude <= block_scale(magnitude, grouping.axes, fmt) * fmt.element.largest)
