"""Error of a rounded tensor as sums that pieces add up to, so that no tensor need be held whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, log10, sqrt
from statistics import median

import torch
from torch import Tensor

from fp4rl.numerics.errors import EXACT_DB, ErrorSplit, split
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reach import within_reach
from fp4rl.numerics.reference import widened
from fp4rl.spec.formats import Format

_TINY = 1e-300


@dataclass
class Tally:
    """Sums over values x and what they were rounded to. `rows` holds the relative error of single rows (tokens)."""

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
    rows: list[float] = field(default_factory=list)

    def add(self, piece: "Rounded", *, each_row: bool = False) -> None:
        """One piece; `each_row` also keeps the relative error of every row."""
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

    def merge(self, other: "Tally") -> None:
        """Add the sums of another."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def measures(self) -> dict[str, float]:
        """Every measure of `numerics.errors.ErrorMeasures` by name, over all pieces together; where rows were kept also
        `row_median`, the median over rows of the relative error.
        """
        power = self.error / max(self.signal, _TINY)
        found = {
            "sqnr_db": min(EXACT_DB, -10 * log10(power) if power > 0 else inf),
            "relative_l2": sqrt(power),
            "relative_l1": self.abs_error / max(self.abs_signal, _TINY),
            "mean_relative": self.ratio / max(self.nonzero, 1),
            "deadzone_share": self.dead / max(self.nonzero, 1),
            "clipped_share": self.clipped / max(self.values, 1),
            "clipped_error": self.clipped_error / max(self.error, _TINY),
        }
        for part in ("scale_bias", "deadzone", "grid_noise"):
            found[part] = sqrt(getattr(self, part) / max(self.signal, _TINY))
        return found | ({"row_median": median(self.rows)} if self.rows else {})


def pooled(tallies: list[Tally]) -> Tally:
    """The tally of all values together."""
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total


def excess(measures: Mapping[str, float], ideal: Mapping[str, float]) -> float:
    """How many times the error of ideal Gaussian data in the same format (relative_l2); 1 is the format's own floor."""
    floor = ideal["relative_l2"]
    return measures["relative_l2"] / floor if floor > 0 else (1.0 if measures["relative_l2"] == 0 else inf)


def _sum(values: Tensor) -> float:
    return float(_rows(values).sum())


def _rows(values: Tensor) -> Tensor:
    return values.sum(-1).double()


def _safe(values: Tensor, largest: float) -> Tensor:
    """In float32 where squares neither vanish nor overflow there, else in float64."""
    wide = widened(values)
    return wide if largest == 0.0 or 1e-12 < largest < 1e15 else wide.double()


@dataclass(frozen=True, eq=False)
class Rounded:
    """Values [rows, columns], what they became, whether their scale can hold them, and the three parts of the error.

    `largest` is the largest magnitude of the values, or of the tensor that they are a piece of.
    """

    values: Tensor
    largest: float
    rounded: Tensor
    reach: Tensor
    parts: ErrorSplit


def round_piece(x: Tensor, fmt: Format, name: str = "tensor", amax: float | None = None) -> Rounded:
    """One piece [rows, columns] of a tensor, rounded as in the whole.

    Where one scale serves the whole tensor, `amax` is its largest magnitude: one more row carries it along. Raises
    InvalidValueError, naming the tensor, for NaN and infinity.
    """
    if amax is not None:
        beyond = x.new_zeros(1, x.shape[-1])
        beyond[0, 0] = amax
        x = torch.cat([x, beyond])
    generator = torch.Generator(x.device).manual_seed(0) if fmt.rounding == "stochastic" else None
    largest = float(widened(x).abs().max()) if x.numel() else 0.0
    rounded = fake_quantize(x, fmt, generator=generator, check_finite=not isfinite(largest), name=name)
    rows = len(x) - (amax is not None)
    parts = {part: value[:rows] for part, value in vars(split(x, rounded, fmt)).items()}
    return Rounded(x[:rows], largest, rounded[:rows], within_reach(x, fmt)[:rows], ErrorSplit(**parts))
