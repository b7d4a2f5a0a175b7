"""The history of one signal over a run, and the few robust numbers that checks compare it with."""

from itertools import pairwise
from math import isfinite
from statistics import median

# A normal standard deviation from a median absolute deviation; differences of two have sqrt(2) of it.
_MAD_TO_SD = 1.4826
_SQRT2 = 2**0.5
NOISE_WINDOW = 30
_SMOOTH = 5
_FALL = 3
LEVELS = (2, 3, 5, 10, 20)
"""Widths of the windows over which levels are compared."""


class SignalHistory:
    """Values of one signal in order of observation. Every question is about the run's own past.

    All answers are None while there are too few observations to give one.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._total = [0.0]  # of the first n values
        self._best: dict[int, float] = {}
        self._lowest: float | None = None

    def add(self, step: int, value: float) -> None:
        """One more observation; a value that is not finite is left out."""
        if not isfinite(value):
            return
        self.steps.append(step)
        self.values.append(value)
        self._total.append(self._total[-1] + value)
        if len(self.values) >= 3:
            smooth = median(self.values[-_SMOOTH:])
            self._lowest = smooth if self._lowest is None else min(self._lowest, smooth)
        for width in LEVELS:
            mean = self.mean(width)
            if mean is not None:
                self._best[width] = max(self._best.get(width, mean), mean)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float | None:
        """The newest value; None before there is one."""
        return self.values[-1] if self.values else None

    @property
    def first(self) -> float | None:
        """The oldest value; None before there is one."""
        return self.values[0] if self.values else None

    @property
    def spacing(self) -> float:
        """Steps from one observation to the next, as a rule; 1 before there are two."""
        recent = self.steps[-NOISE_WINDOW:]
        return max(1.0, median(b - a for a, b in pairwise(recent))) if len(recent) > 1 else 1.0

    def mean(self, width: int) -> float | None:
        """Mean of the last `width` observations; None before there are as many."""
        n = len(self.values)
        return (self._total[n] - self._total[n - width]) / width if 0 < width <= n else None

    def start(self, width: int) -> float:
        """Mean of the first `width` observations, of which there must be as many."""
        return self._total[width] / width

    def bests(self) -> dict[int, float]:
        """Width of a window -> the highest mean that any window so wide has had; how far to trust it, see `loss`."""
        return self._best

    @property
    def lowest(self) -> float | None:
        """Lowest running median of five so far."""
        return self._lowest

    def early(self, most: int) -> float | None:
        """Median of the first observations: a quarter of them, so that an early failure does not become the measure.

        At least 3 observations and at most `most` steps of them; None before there are 4.
        """
        n, limit = len(self.values), round(most / self.spacing)
        return median(self.values[: max(3, min(limit, n // 4))]) if n >= 4 else None

    def level(self, width: int = 3, ago: int = 0) -> float | None:
        """Median of `width` observations that ended `ago` observations before the last."""
        end = len(self.values) - ago
        return median(self.values[end - width : end]) if end >= width else None

    def lately(self, most: int) -> float | None:
        """Median of the last observations, at most `most` of them; None before there is one."""
        return median(self.values[-most:]) if self.values else None

    def level_at(self, step: int) -> float | None:
        """Median of the last 3 observations up to `step`."""
        past = [v for s, v in zip(self.steps, self.values, strict=True) if s <= step][-3:]
        return median(past) if past else None

    def recent(self, window: int, ago: int) -> float | None:
        """Median of up to `window` observations, leaving out the last `ago`; needs 3."""
        past = self.values[max(0, len(self.values) - ago - window) : len(self.values) - ago]
        return median(past) if len(past) >= 3 else None

    def noise(self) -> float | None:
        """Standard deviation from one observation to the next, robust to jumps and blind to a trend."""
        window = self.values[-NOISE_WINDOW:]
        if len(window) < 4:
            return None
        steps = [b - a for a, b in pairwise(window)]
        middle = median(steps)
        return _MAD_TO_SD * median(abs(s - middle) for s in steps) / _SQRT2

    def spread(self) -> float:
        """Return the larger of `noise` and the plain spread, which equal neighbours do not hide; 0 before it is known.

        Shares of few answers are often 0 or 1 twice in a row, and a median of such differences is 0. The last few
        observations are left out: a fall is no measure of itself.
        """
        past = self.values[: max(len(self.values) - _FALL, 4)][-NOISE_WINDOW:]
        steps = [b - a for a, b in pairwise(past)]
        plain = (sum(s * s for s in steps) / len(steps)) ** 0.5 / _SQRT2 if steps else 0.0
        return max(plain, self.noise() or 0.0)


def trend(values: list[float]) -> tuple[float, float] | None:
    """(level at the last value, slope per observation) of a robust straight line (Theil-Sen); None below 4 values."""
    n = len(values)
    if n < 4:
        return None
    slope = median((values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    return median(v + slope * (n - 1 - i) for i, v in enumerate(values)), slope
