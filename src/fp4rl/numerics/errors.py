"""How large a format's error is on a tensor, and of what it is made: each measure beside its ideal on Gaussian data.

The split is exact: scale bias + deadzone + grid noise is the error of every element. The ideal, real-valued scale
of a block maps its largest magnitude to the element's largest; rounding under that scale tells what any scale
format would leave behind.

    scale bias   rounded under the stored scale - rounded under the ideal scale
    deadzone     what is left of the values that the ideal scale rounds to zero
    grid noise   what is left of the others

After arXiv 2605.20402, which names the three parts; the element-wise definition here is this project's.
"""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import log10

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.levels import inside
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reach import within_reach
from fp4rl.numerics.reference import widened
from fp4rl.numerics.rounding import round_magnitude
from fp4rl.numerics.scales import divided, nan_where_not_finite
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format

OCTAVE = 8  # a power-of-two scale cares where in an octave the data lie, so the ideal is a mean over this many sizes
IDEAL_SHAPE = (512, 512)
EXACT_DB = 200.0  # stands for an error of zero


@dataclass(frozen=True)
class ErrorMeasures:
    """One tensor's error. Shares lie in 0..1; the last three are the root of a part's squared sum over that of the
    values."""

    sqnr_db: float
    relative_l2: float  # sqrt(sum e^2 / sum x^2)
    relative_l1: float  # sum|e| / sum|x|
    mean_relative: float  # mean of |e| / |x| over the nonzero values
    deadzone_share: float  # of the nonzero values, those that became zero
    clipped_share: float  # values beyond what their block's scale holds
    clipped_error: float  # their share of the squared error
    scale_bias: float
    deadzone: float
    grid_noise: float

    def as_dict(self) -> dict[str, float]:
        """The measures by name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ErrorSplit:
    """The three parts of an error, float64 like the tensor; they add up to it element by element."""

    scale_bias: Tensor
    deadzone: Tensor
    grid_noise: Tensor


@torch.no_grad()
def measure(x: Tensor, rounded: Tensor, fmt: Format) -> ErrorMeasures:
    """Every measure of `rounded` [any shape, like x], which `fmt` made of `x`; raises InvalidValueError for NaN and
    infinity."""
    if x.shape != rounded.shape or not bool(x.isfinite().all() and rounded.isfinite().all()):
        raise InvalidValueError("an error is measured between two finite tensors of one shape")
    exact = x.double()
    error = rounded.double() - exact
    square, signal = error.square(), exact.square().sum().item()
    total, alive, reach = square.sum().item(), exact != 0, within_reach(x, fmt)
    parts = split(x, rounded, fmt)
    power = total / signal if signal else 0.0
    ratios = (error.abs() / exact.abs())[alive]
    return ErrorMeasures(
        sqnr_db=min(EXACT_DB, -10 * log10(power)) if power else EXACT_DB,
        relative_l2=power**0.5,
        relative_l1=_share(error.abs().sum(), exact.abs().sum()),
        mean_relative=ratios.mean().item() if ratios.numel() else 0.0,
        deadzone_share=_share((alive & (rounded == 0)).sum(), alive.sum()),
        clipped_share=_share((~reach).sum(), torch.tensor(x.numel())),
        clipped_error=_share(square[~reach].sum(), square.sum()),
        **{name: (part.square().sum().item() / signal) ** 0.5 if signal else 0.0 for name, part in vars(parts).items()},
    )


@torch.no_grad()
def split(x: Tensor, rounded: Tensor, fmt: Format) -> ErrorSplit:
    """The exact three-way split of `rounded - x`. Sums are exact in float64 for inputs of up to float32's precision.

    Stochastic noise counts as grid noise or deadzone: the scale bias compares roundings to nearest. A rotated
    format is split in the rotated basis.
    """
    if fmt.rotation:
        plain = replace(fmt, rotation=None)
        x, rounded = (inside(t, replace(fmt, coarse=None))[0] for t in (x, rounded))
        return split(x, rounded, plain)
    wide = widened(x)
    ideal = ideally_rounded(wide, fmt)
    steady = replace(fmt, rounding="nearest_even")
    settled = fake_quantize(wide, steady) if fmt.rounding == "stochastic" else rounded
    bias = settled.double() - ideal.double()
    rest = (rounded.double() - wide.double()) - bias
    dead = torch.where(ideal == 0, rest, 0.0)
    return ErrorSplit(bias, dead, rest - dead)


def ideally_rounded(x: Tensor, fmt: Format) -> Tensor:
    """`x` (float32 or float64) rounded under the real-valued scale that maps each block's largest magnitude to the
    element's largest: what is left when the scale's own format costs nothing.
    """
    if fmt.scale == "none":
        return fake_quantize(x, fmt)
    grouping = Grouping(x.shape, fmt.block)
    blocks = grouping.split(x)
    magnitude = blocks.abs()
    amax = magnitude.amax(grouping.axes, keepdim=True)
    scale = nan_where_not_finite(divided(amax, fmt.element.largest).clamp(min=torch.finfo(x.dtype).tiny), amax)
    rounding = "nearest_even" if fmt.rounding == "stochastic" else fmt.rounding
    rounded = round_magnitude(magnitude / scale, fmt.element, rounding)
    return grouping.join((rounded * scale).copysign(blocks))


@lru_cache(maxsize=64)
def gaussian_ideal(fmt: Format) -> ErrorMeasures:
    """What ideal Gaussian data would give, so that a reader can tell the format's floor from a tensor's own problem.

    The mean of each measure over eight standard deviations that span an octave, 2^18 values each, from a fixed
    generator.
    """
    generator = torch.Generator().manual_seed(0)
    measures = []
    for i in range(OCTAVE):
        x = torch.randn(IDEAL_SHAPE, generator=generator) * 2.0 ** (i / OCTAVE)
        measures.append(measure(x, fake_quantize(x, fmt, generator=generator), fmt).as_dict())
    return ErrorMeasures(**{name: sum(m[name] for m in measures) / OCTAVE for name in measures[0]})


def _share(part: Tensor, whole: Tensor) -> float:
    return part.item() / whole.item() if whole.item() else 0.0
