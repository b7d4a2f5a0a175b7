"""Mean, variance, skew and kurtosis of any number of values, seen once and piece by piece."""

from dataclasses import dataclass
from math import inf, nan, sqrt

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean, sums of powers of the deviation from it, and extremes; `+` merges (Pebay, SAND2008-6212)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    low: float = inf
    high: float = -inf

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Moments of all elements of a tensor of any shape, computed in float64."""
        if not values.numel():
            return cls()
        exact = values.detach().double().flatten()
        mean = exact.mean()
        deviation = exact - mean
        square = deviation * deviation
        m2, m3, m4 = square.sum(), (square * deviation).sum(), (square * square).sum()
        low, high = exact.aminmax()
        return cls(exact.numel(), *(float(value) for value in (mean, m2, m3, m4, low, high)))

    def __add__(self, other: "Moments") -> "Moments":
        if not self.count or not other.count:
            return self if self.count else other
        na, nb, n = self.count, other.count, self.count + other.count
        d = other.mean - self.mean
        m2 = self.m2 + other.m2 + d * d * na * nb / n
        m3 = self.m3 + other.m3 + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * other.m2 - nb * self.m2) / n
        m4 = (
            self.m4
            + other.m4
            + d**4 * na * nb * (na * na - na * nb + nb * nb) / n**3
            + 6 * d * d * (na * na * other.m2 + nb * nb * self.m2) / n**2
            + 4 * d * (na * other.m3 - nb * self.m3) / n
        )
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Moments(n, self.mean + d * nb / n, m2, m3, m4, low, high)

    @property
    def std(self) -> float:
        """Population standard deviation; NaN without values."""
        return sqrt(self.m2 / self.count) if self.count else nan

    @property
    def rms(self) -> float:
        """Root mean square."""
        return sqrt(self.m2 / self.count + self.mean**2) if self.count else nan

    @property
    def excess_kurtosis(self) -> float:
        """0 for Gaussian values, NaN when they do not vary."""
        return self.count * self.m4 / self.m2**2 - 3 if self.m2 > 0 else nan
