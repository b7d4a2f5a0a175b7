"""Bands that a suite states beforehand: what a number at a step will be called, and what comes next then."""

from collections.abc import Iterator
from math import inf

from pydantic import Field, NonNegativeInt, field_validator

from fp4rl.spec.frozen import Spec


class FollowUp(Spec):
    """What a band calls for: suites of the catalogue or files, and why."""

    do: tuple[str, ...] = Field(description="suites, such as e13h of the catalogue")
    why: str = Field(description="in words")


class Criterion(Spec):
    """Names the band in which a mean over seeds lies. A band never replaces a verdict: it is shown with its interval.

    The number is the accuracy of `of` in percent, or another `metric` of its runs; with `against` its difference to
    that of another side. Each of `bands` is from its number up to the next; the one without a number takes the rest.
    """

    of: str = Field(description="arm@profile, or arm where `metric` is one that every step logs")
    against: str | None = Field(default=None, description="the side whose number is taken off")
    metric: str = Field(default="accuracy", description="accuracy, or a key of metrics.jsonl such as policy/entropy")
    step: NonNegativeInt | None = Field(default=None, description="by default the last")
    bands: dict[str, float | None] = Field(
        description="name: the number from which it begins, such as {pass: -1.0, marginal: -3.0, fail: null}"
    )
    next: dict[str, FollowUp] = Field(default_factory=dict, description="band: what to do then")

    def _conflicts(self) -> Iterator[str]:
        limits = [limit for limit in self.bands.values() if limit is not None]
        if not limits or len(limits) != len(self.bands) - 1:
            yield "bands: name at least two; all but one begin at a number, and one is null and takes the rest"
        elif len({*limits}) < len(limits):
            yield "bands: two of them begin at the same number"
        unknown = [band for band in self.next if band not in self.bands]
        if unknown:
            yield f"next.{unknown[0]}: is no band; those are {', '.join(self.bands)}"

    @field_validator("bands")
    @classmethod
    def _best_first(cls, bands: dict[str, float | None]) -> dict[str, float | None]:
        """Return them in falling order, in which everything shows them."""
        return dict(sorted(bands.items(), key=lambda item: inf if item[1] is None else -item[1]))

    def band_of(self, value: float) -> str:
        """Return the band of a number."""
        return next(band for band, limit in self.bands.items() if limit is None or value >= limit)
