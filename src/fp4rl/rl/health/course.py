"""The course of one signal over a run, and the few robust numbers that checks compare it with."""

from itertools import pairwise
from math import isfinite
from statistics import median

# A normal standard deviation from a median absolute deviation; differences of two have sqrt(2) of it.
_MAD_TO_SD = 1.4826
_SQRT2 = 2**0.5
_NOISE_WINDOW = 30
_SMOOTH = 5


class Course:
    """Values of one signal in order of observation. Every question is about the run's own past.

    All answers are None while there are too few observations to give one.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self._best: float | None = None
        self._lowest: float | None = None

    def add(self, step: int, value: float) -> None:
        """One more observation; a value that is not finite is left out."""
        if not isfinite(value):
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.values) >= 3:
            smooth = median(self.values[-_SMOOTH:])
            self._best = smooth if self._best is None else max(self._best, smooth)
            self._lowest = smooth if self._lowest is None else min(self._lowest, smooth)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None

    @property
    def first(self) -> float | None:
        return self.values[0] if self.values else None

    @property
    def best(self) -> float | None:
        """Highest running median of five so far."""
        return self._best

    @property
    def lowest(self) -> float | None:
        """Lowest running median of five so far."""
        return self._lowest

    def early(self, most: int) -> float | None:
        """Median of the first observations: a quarter of them, so that an early failure does not become the measure.

        At least 3 and at most `most` of them; None before there are 4.
        """
        n = len(self.values)
        return median(self.values[: max(3, min(most, n // 4))]) if n >= 4 else None

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
        window = self.values[-_NOISE_WINDOW:]
        if len(window) < 4:
            return None
        steps = [b - a for a, b in pairwise(window)]
        middle = median(steps)
        return _MAD_TO_SD * median(abs(s - middle) for s in steps) / _SQRT2


def trend(values: list[float]) -> tuple[float, float] | None:
    """(level at the last value, slope per observation) of a robust straight line (Theil-Sen); None below 4 values."""
    n = len(values)
    if n < 4:
        return None
    slope = median((values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    return median(v + slope * (n - 1 - i) for i, v in enumerate(values)), slope
