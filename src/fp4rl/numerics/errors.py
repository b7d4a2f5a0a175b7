"""How large a format's error is on a tensor and which parts it has, each measure beside its ideal on Gaussian data.

The split is exact: scale bias + deadzone + grid noise is the error of every element. The ideal, real-valued scale of a
block maps its largest magnitude to the element's largest; the error under it is what remains with any format of scales.


    scale bias   rounded under the stored scale - rounded under the ideal scale
    deadzone     the rest of the error, of values that the ideal scale rounds to zero
    grid noise   the rest of the error, of all other values

After arXiv 2605.20402, which names the three parts; the element-wise definition here is this project's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import inf, isfinite, log10, sqrt
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fp4rl.numerics.blocks import Grouping
from fp4rl.numerics.fallback import rounded_twice
from fp4rl.numerics.levels import inside, within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import widened
from fp4rl.numerics.rounding import round_magnitude
from fp4rl.numerics.scales import divided, nan_where_not_finite
from fp4rl.spec.errors import InvalidValueError, NotFinite
from fp4rl.spec.formats import Format

OCTAVE = 8  # a power-of-two scale cares where in an octave the data lie, so the ideal is a mean over this many sizes
IDEAL_SHAPE = (512, 512)
EXACT_DB = 200.0  # stands for an error of zero
_TINY = 1e-300
SHAPE = (512, 2048)  # of the data that formats are tried on
SIZE = 0.02  # standard deviation, the size of real weights
DEGREES = 4.0  # of Student's t
OUTLIER_EVERY = 128  # channels
OUTLIER_TIMES = 30.0


class ErrorSplit(NamedTuple):
    """The three parts of an error, float64 like the tensor; they add up to it element by element."""

    scale_bias: Tensor
    deadzone: Tensor
    grid_noise: Tensor


@dataclass(frozen=True, eq=False)
class Rounded:
    """Values [rows, columns], what they became, and the three parts of the error; `reach`: which were not clipped."""

    values: Tensor
    largest: float  # magnitude of the values, or of the tensor that they are a piece of
    rounded: Tensor
    reach: Tensor
    parts: ErrorSplit


@dataclass
class ErrorSums:
    """Sums over values and their errors. Sums of pieces add up, so that no tensor need be held whole."""

    values: int = 0
    signal: float = 0.0
    error: float = 0.0
    abs_signal: float = 0.0
    abs_error: float = 0.0
    ratio: float = 0.0
    nonzero: int = 0
    dead: int = 0
    clipped: int = 0
    clipped_error: float = 0.0
    scale_bias: float = 0.0
    deadzone: float = 0.0
    grid_noise: float = 0.0
    rows: list[float] = field(default_factory=list)  # relative errors of single rows (tokens)

    def add(self, piece: Rounded, *, each_row: bool = False) -> None:
        """Add one piece; `each_row` also keeps the relative error of every row."""
        # Rows are added in the dtype of the maths, float32 mostly, and sums of rows in float64. Masks cost more than
        # all the arithmetic, so counts are sums of zeros and ones.
        exact, parts = _safe(piece.values, piece.largest), piece.parts
        rounded, reach = piece.rounded.to(exact.dtype), piece.reach.to(exact.dtype)
        error = rounded - exact
        size, off = exact.abs(), error.abs()
        square = error * error
        power, each = _rows(exact * exact), _rows(square)
        self.values += exact.numel()
        self.signal += float(power.sum())
        self.error += float(each.sum())
        self.abs_signal += _sum(size)
        self.abs_error += _sum(off)
        self.ratio += _sum(off / size.clamp_min(torch.finfo(size.dtype).tiny))  # of a zero the error is zero
        nonzero = round(_sum(size.sign()))
        self.nonzero += nonzero
        self.dead += nonzero - round(_sum(rounded.abs().sign()))
        self.clipped += size.numel() - round(_sum(reach))
        self.clipped_error += float(each.sum()) - _sum(square * reach)
        self.scale_bias += _sum(parts.scale_bias.square())
        self.deadzone += _sum(parts.deadzone.square())
        self.grid_noise += _sum(parts.grid_noise.square())
        if each_row:
            self.rows += (each / power.clamp_min(_TINY)).sqrt()[power > 0].tolist()

    def merge(self, other: "ErrorSums") -> None:
        """Add the sums of another."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def measures(self) -> dict[str, float]:
        """Return every measure by name; e = Q(x) - x, shares lie in 0..1.

        sqnr_db          -10 log10(sum e^2 / sum x^2), EXACT_DB for no error
        relative_l2      sqrt(sum e^2 / sum x^2); relative_l1  sum |e| / sum |x|
        mean_relative    mean of |e| / |x| over the nonzero values
        deadzone_share   of the nonzero values, those that became zero
        clipped_share    values beyond what their block's scale holds; clipped_error  their share of sum e^2
        scale_bias, deadzone, grid_noise    root of the part's squared sum over that of the values
        row_median       median over rows of the relative error, where rows were kept
        """
        power = self.error / max(self.signal, _TINY)
        measured = {
            "sqnr_db": min(EXACT_DB, -10 * log10(power) if power > 0 else inf),
            "relative_l2": sqrt(power),
            "relative_l1": self.abs_error / max(self.abs_signal, _TINY),
            "mean_relative": self.ratio / max(self.nonzero, 1),
            "deadzone_share": self.dead / max(self.nonzero, 1),
            "clipped_share": self.clipped / max(self.values, 1),
            "clipped_error": self.clipped_error / max(self.error, _TINY),
        }
        for part in ("scale_bias", "deadzone", "grid_noise"):
            measured[part] = sqrt(getattr(self, part) / max(self.signal, _TINY))
        return measured | ({"row_median": median(self.rows)} if self.rows else {})


def pooled(parts: Iterable[ErrorSums]) -> ErrorSums:
    """Return the sums of all values together."""
    total = ErrorSums()
    for part in parts:
        total.merge(part)
    return total


def measure(x: Tensor, rounded: Tensor, fmt: Format) -> dict[str, float]:
    """Return every measure of `rounded`, which `fmt` made of `x`. Raises InvalidValueError unless finite and alike."""
    if x.shape != rounded.shape or not bool(x.isfinite().all() and rounded.isfinite().all()):
        raise InvalidValueError("an error is measured between two finite tensors of one shape")
    sums = ErrorSums()
    sums.add(Rounded(x, float(widened(x).abs().max()), rounded, within_reach(x, fmt), split(x, rounded, fmt)))
    return sums.measures()


def round_piece(x: Tensor, fmt: Format, name: str = "tensor", amax: float | None = None) -> Rounded:
    """Return one piece [rows, columns] of a tensor, rounded as in the whole.

    Where one scale serves the whole tensor, `amax` is its largest magnitude: one more row carries it along. Raises
    NotFinite, naming the tensor, for NaN and infinity.
    """
    if amax is not None:
        beyond = x.new_zeros(1, x.shape[-1])
        beyond[0, 0] = amax
        x = torch.cat([x, beyond])
    generator = torch.Generator(x.device).manual_seed(0) if fmt.rounding == "stochastic" else None
    largest = float(widened(x).abs().max()) if x.numel() else 0.0
    if not isfinite(largest):
        raise NotFinite(f"{name}: holds NaN or infinity; {fmt.name} would turn whole blocks of it into NaN")
    rounded = fake_quantize(x, fmt, generator=generator)
    rows = len(x) - (amax is not None)
    parts = ErrorSplit(*(part[:rows] for part in split(x, rounded, fmt)))
    return Rounded(x[:rows], largest, rounded[:rows], within_reach(x, fmt)[:rows], parts)


@torch.no_grad()
def split(x: Tensor, rounded: Tensor, fmt: Format) -> ErrorSplit:
    """Split `rounded - x` exactly into three. Sums are exact in float64 for inputs of up to float32's precision.

    Stochastic noise counts as grid noise or deadzone: the scale bias compares roundings to nearest. A rotated
    format is split in the rotated basis.
    """
    if fmt.rotation:
        x, rounded = (inside(t, replace(fmt, coarse=None))[0] for t in (x, rounded))
        return split(x, rounded, replace(fmt, rotation=None))
    wide = widened(x)
    ideal = ideally_rounded(wide, fmt)
    stochastic = fmt.rounding == "stochastic"
    settled = fake_quantize(wide, replace(fmt, rounding="nearest_even")) if stochastic else rounded
    # Both are rounded to nearest, so that they differ by their scales alone.
    bias = settled.double() - ideal.double()
    rest = (rounded.double() - wide.double()) - bias
    dead = torch.where(ideal == 0, rest, 0.0)
    return ErrorSplit(bias, dead, rest - dead)


def ideally_rounded(x: Tensor, fmt: Format) -> Tensor:
    """Round `x` (float32 or float64) under each block's ideal, real-valued scale; twice where the format does."""
    if fmt.scale == "none":
        return fake_quantize(x, fmt)
    if fmt.fallback is not None:
        return rounded_twice(x, fmt, partial(ideally_rounded, fmt=replace(fmt, fallback=None)))
    grouping = Grouping.of(x.shape, fmt)
    blocks = grouping.split(x)
    magnitude = blocks.abs()
    amax = magnitude.amax(grouping.axes, keepdim=True)
    scale = nan_where_not_finite(divided(amax, fmt.element.largest).clamp(min=torch.finfo(x.dtype).tiny), amax)
    rounding = "nearest_even" if fmt.rounding == "stochastic" else fmt.rounding
    rounded = round_magnitude(magnitude / scale, fmt.element, rounding)
    return grouping.join((rounded * scale).copysign(blocks))


@lru_cache(maxsize=64)
def gaussian_ideal(fmt: Format) -> Mapping[str, float]:
    """Measure the format on ideal Gaussian data: the error of the format itself, to compare a tensor's with.

    The mean of each measure over eight standard deviations that span an octave, 2^18 values each, from seed 0.
    """
    if fmt.factor == "static":  # seen on other data
        return gaussian_ideal(replace(fmt, factor="tensor", calibrated=None))
    generator = torch.Generator().manual_seed(0)
    measured = []
    for i in range(OCTAVE):
        x = torch.randn(IDEAL_SHAPE, generator=generator) * 2.0 ** (i / OCTAVE)
        measured.append(measure(x, fake_quantize(x, fmt, generator=generator), fmt))
    return MappingProxyType({name: sum(m[name] for m in measured) / OCTAVE for name in measured[0]})


def gaussian(generator: torch.Generator) -> Tensor:
    """Draw [512, 2048] normal values."""
    return SIZE * torch.randn(SHAPE, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Draw [512, 2048] values of Student's t with 4 degrees of freedom: normal over the RMS of four normal values."""
    squares = torch.randn((int(DEGREES), *SHAPE), generator=generator).square().mean(0)
    return gaussian(generator) / squares.sqrt()


def outlier_channels(generator: torch.Generator) -> Tensor:
    """Draw [512, 2048] normal values, every 128th column 30 times as large, as in the inputs of many layers."""
    x = gaussian(generator)
    x[:, ::OUTLIER_EVERY] *= OUTLIER_TIMES
    return x


DATA: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_channels": outlier_channels,
}


def errors_on(fmt: Format, seed: int = 0) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the format's measures on each kind of data, every kind from its own generator of that seed."""
    for name, draw in DATA.items():
        generator = torch.Generator().manual_seed(seed)
        x = draw(generator)
        yield name, measure(x, fake_quantize(x, fmt, generator=generator), fmt)


def _sum(values: Tensor) -> float:
    return float(_rows(values).sum())


def _rows(values: Tensor) -> Tensor:
    return values.sum(-1).double()


def _safe(values: Tensor, largest: float) -> Tensor:
    """Return the values in float32 where their squares neither vanish nor overflow, else in float64."""
    wide = widened(values)
    return wide if largest == 0.0 or 1e-12 < largest < 1e15 else wide.double()
