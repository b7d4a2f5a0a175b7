"""Accuracy of every arm under every profile: one value per seed, their mean, and an interval over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import special

from fp4rl.lab.report.runs import Measurement, Profile, Run
from fp4rl.lab.statistics.seeds import variance


@dataclass(frozen=True)
class Mean:
    """A mean over `seeds` values in points. `low`, `high`: the 95 % interval (t), None where chance is not measured."""

    value: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class SeedScore:
    """What one run scored in points. `counts` is False for a run that is not comparable: shown, never averaged."""

    seed: int
    run_id: str
    counts: bool
    stale: bool
    start: Measurement | None
    end: Measurement | None


@dataclass(frozen=True)
class Score:
    """One arm under one profile. Means hold only runs that count; None where there is none."""

    arm: str
    profile: str
    by_seed: tuple[SeedScore, ...]
    before: Mean | None
    after: Mean | None
    flexible: Mean | None
    formatted: Mean | None
    formatted_before: Mean | None
    truncated: Mean | None
    of_samples: Mapping[str, Mean]

    @property
    def name(self) -> str:
        """`arm@profile`, as comparisons write it."""
        return f"{self.arm}@{self.profile}"

    @property
    def values(self) -> tuple[float, ...]:
        """Strict accuracy at the last step in points, one value per run that counts."""
        return tuple(s.end.strict for s in self.by_seed if s.counts and s.end is not None)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The distinct profiles under which the last step was measured; more than one is a fault."""
        return tuple(dict.fromkeys(s.end.profile for s in self.by_seed if s.end is not None))

    @property
    def rounds_nothing(self) -> bool:
        """Whether the last step was measured with nothing injected, as far as the runs recorded it."""
        return bool(self.profiles) and all(p.precision and not p.sites_digest for p in self.profiles)

    @property
    def problems(self) -> int | None:
        """Problems per run; None where the runs differ or there is none."""
        found = {s.end.problems for s in self.by_seed if s.end is not None}
        return found.pop() if len(found) == 1 else None


def scores(runs: Iterable[Run]) -> tuple[Score, ...]:
    """Every arm x profile that the runs were asked to be judged under, in the order of the suite."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.planned.arm, []).append(run)
    return tuple(_score(arm, profile, group) for arm, group in by_arm.items() for profile in group[0].profiles)


def mean_over_seeds(values: Sequence[float], level: float = 0.95) -> Mean | None:
    """Student's t interval of the mean of one value per seed, cut at 0 and 100 points; None for no value.

    One seed, or seeds that do not differ at all, measure no chance: the mean then has no interval.
    """
    if not values:
        return None
    mean = fmean(values)
    if len(set(values)) < 2:
        return Mean(mean, None, None, len(values))
    half = float(special.stdtrit(len(values) - 1, (1 + level) / 2)) * math.sqrt(variance(values) / len(values))
    return Mean(mean, max(0.0, mean - half), min(100.0, mean + half), len(values))


def _score(arm: str, profile: str, runs: list[Run]) -> Score:
    by_seed = tuple(
        SeedScore(
            run.planned.seed, run.planned.run_id, run.counts, run.stale, run.at_start(profile), run.at_end(profile)
        )
        for run in runs
        if run.state == "finished"
    )
    counted = [s for s in by_seed if s.counts]
    starts = [s.start for s in counted if s.start is not None]
    ends = [s.end for s in counted if s.end is not None]
    return Score(
        arm=arm,
        profile=profile,
        by_seed=by_seed,
        before=mean_over_seeds([m.strict for m in starts]),
        after=mean_over_seeds([m.strict for m in ends]),
        flexible=mean_over_seeds([m.flexible for m in ends if m.flexible is not None]),
        formatted=mean_over_seeds([m.formatted for m in ends if m.formatted is not None]),
        formatted_before=mean_over_seeds([m.formatted for m in starts if m.formatted is not None]),
        truncated=mean_over_seeds([m.truncated for m in ends if m.truncated is not None]),
        of_samples=_of_samples(ends),
    )


def _of_samples(ends: Sequence[Measurement]) -> dict[str, Mean]:
    """`pass@k` and `mean@k` over seeds, where every run has them."""
    names = [name for name in ends[0].of_samples if all(name in m.of_samples for m in ends)] if ends else []
    found = {name: mean_over_seeds([m.of_samples[name] for m in ends]) for name in names}
    return {name: mean for name, mean in found.items() if mean is not None}
