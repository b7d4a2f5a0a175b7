"""Run-to-run spread: how far two runs lie apart that differ in nothing but the seed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import special

from fp4rl.lab.statistics.seeds import variance


@dataclass(frozen=True)
class Spread:
    """A standard deviation pooled over groups of repeats, with the degrees of freedom it rests on."""

    sd: float
    freedom: int
    groups: int

    def band(self, seeds: tuple[int, int], level: float = 0.95) -> float:
        """Half the width of the band that holds `level` of the differences of two arms that are the same."""
        quantile = float(special.stdtrit(self.freedom, (1 + level) / 2))
        return quantile * self.sd * math.sqrt(1 / seeds[0] + 1 / seeds[1])


def pooled(groups: Iterable[Sequence[float]]) -> Spread | None:
    """The spread over groups of repeats (each: one value per seed of the same experiment); None where nothing repeats.

    Groups of one tell nothing about spread and are left out.
    """
    repeats = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeats)
    if not freedom:
        return None
    squares = math.fsum(variance(group) * (len(group) - 1) for group in repeats)
    return Spread(math.sqrt(squares / freedom), freedom, len(repeats))
