"""Accuracy of every arm under every profile: one value per seed, their mean, and an interval over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import special

from fp4rl.lab.statistics.seeds import LEVEL
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.evidence import Evaluation, Profile


@dataclass(frozen=True)
class Mean:
    """A mean over `seeds` values in points. `low`, `high`: the 95 % interval (t), None where it cannot be estimated."""

    value: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class SeedScore:
    """The scores of one run. A run that is not comparable is shown, but never averaged."""

    run: SuiteRun
    start: Evaluation | None
    end: Evaluation | None

    @property
    def after(self) -> float | None:
        """Strict accuracy at the last step, in points."""
        return None if self.end is None else 100 * self.end.strict


@dataclass(frozen=True)
class Score:
    """One arm under one profile. Means are over comparable runs; None without any."""

    arm: str
    profile: str
    by_seed: tuple[SeedScore, ...]
    before: Mean | None
    after: Mean | None
    flexible: Mean | None
    formatted: Mean | None
    formatted_before: Mean | None
    truncated: Mean | None
    kl: Mean | None  # KL(unrounded || rounded) of the policy, nats a token
    of_samples: Mapping[str, Mean]  # `pass@k` and `mean@k`, where every run has them

    @property
    def name(self) -> str:
        """`arm@profile`, as comparisons write it."""
        return f"{self.arm}@{self.profile}"

    @property
    def values(self) -> tuple[float, ...]:
        """Strict accuracy at the last step in points, one value per comparable run."""
        return tuple(s.after for s in self.by_seed if s.run.counts and s.after is not None)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The distinct profiles under which the last step was measured; there should be one."""
        return tuple(dict.fromkeys(s.end.profile for s in self.by_seed if s.end is not None))

    @property
    def problems(self) -> int | None:
        """The number of problems per run; None where the runs differ or there are none."""
        counts = {s.end.problems or s.end.n or 0 for s in self.by_seed if s.end is not None}
        return counts.pop() if len(counts) == 1 else None


def scores(by_arm: Mapping[str, Sequence[SuiteRun]]) -> tuple[Score, ...]:
    """Return the scores of every arm under every profile of its spec, in the order of the suite."""
    evaluations = {arm: runs[0].planned.experiment.evaluation for arm, runs in by_arm.items()}
    return tuple(_score(arm, p, by_arm[arm]) for arm, own in evaluations.items() for p in (*own.profiles, *own.sweep))


def mean_over_seeds(values: Sequence[float], least: float = 0.0, most: float = 100.0) -> Mean | None:
    """Return the mean of one value per seed with Student's t interval, cut at `least` and `most`; None for no value.

    With one seed, or with seeds that do not differ at all, the mean has no interval.
    """
    if not values:
        return None
    mean = fmean(values)
    if len(set(values)) < 2:
        return Mean(mean, None, None, len(values))
    half = float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * stdev(values) / math.sqrt(len(values))
    return Mean(mean, max(least, mean - half), min(most, mean + half), len(values))


def _score(arm: str, profile: str, runs: Sequence[SuiteRun]) -> Score:
    measured = [(planned, planned.run) for planned in runs if planned.run is not None]
    by_seed = [SeedScore(planned, run.start(profile), run.evaluations().get(profile)) for planned, run in measured]
    starts = [s.start for s in by_seed if s.run.counts and s.start is not None]
    ends = [s.end for s in by_seed if s.run.counts and s.end is not None]

    def mean(evaluations: Sequence[Evaluation], name: str) -> Mean | None:
        shares = [evaluation.score(name) for evaluation in evaluations]
        return mean_over_seeds([100 * share for share in shares if share is not None])

    names = [name for name in ends[0].of_samples if all(name in end.of_samples for end in ends)] if ends else []
    of_samples = {name: mean(ends, name) for name in names}
    return Score(
        arm=arm,
        profile=profile,
        by_seed=tuple(by_seed),
        before=mean(starts, "strict"),
        after=mean(ends, "strict"),
        flexible=mean(ends, "flexible"),
        formatted=mean(ends, "formatted"),
        formatted_before=mean(starts, "formatted"),
        truncated=mean(ends, "truncated"),
        kl=mean_over_seeds([end.kl for end in ends if end.kl is not None], most=math.inf),
        of_samples={name: value for name, value in of_samples.items() if value is not None},
    )
