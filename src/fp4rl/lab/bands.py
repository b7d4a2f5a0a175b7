"""In which band of a suite's criteria its numbers lie, with the interval over seeds, and what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean

from fp4rl.lab.compare.comparison import answer_all
from fp4rl.lab.compare.declared import suite_questions
from fp4rl.lab.compare.sides import At
from fp4rl.lab.report.scores import mean_over_seeds
from fp4rl.lab.statistics.seeds import welch
from fp4rl.lab.suites import SuiteRun, SuiteRuns
from fp4rl.spec.criteria import Criterion, FollowUp
from fp4rl.spec.words import counted


@dataclass(frozen=True)
class Banded:
    """A criterion with what was measured. Without a `value` no run counts yet; without an interval too few seeds do.

    `refused`: why the suite's own comparison of the two sides is refused; there is no value then.
    """

    criterion: Criterion
    seeds: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    refused: str | None = None

    @property
    def band(self) -> str | None:
        """The band of the value."""
        return None if self.value is None else self.criterion.band_of(self.value)

    @property
    def possible(self) -> tuple[str, ...]:
        """The bands that the interval reaches into, best first; the band alone where there is no interval."""
        if self.value is None or self.low is None or self.high is None:
            return () if self.band is None else (self.band,)
        bands = list(self.criterion.bands)
        first, last = (bands.index(self.criterion.band_of(end)) for end in (self.high, self.low))
        return tuple(bands[first : last + 1])

    @property
    def follow_up(self) -> FollowUp | None:
        """What the band calls for."""
        return None if self.band is None else self.criterion.next.get(self.band)

    def sentence(self) -> str:
        """Return one line: what was measured, its interval, its band, and which others the interval allows."""
        of = self.criterion.of + (f" minus {self.criterion.against}" if self.criterion.against else "")
        where = "at the end" if self.criterion.step is None else f"at step {self.criterion.step}"
        if self.refused is not None:
            return f"{of}, {self.criterion.metric} {where}: not comparable: {self.refused}"
        if self.value is None:
            return f"{of}, {self.criterion.metric} {where}: no run counts yet"
        unit = " points" if self.criterion.against else " %"
        shown = f"{self.value:+.1f}{unit}" if self.criterion.metric == "accuracy" else f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            shown += f" [{self.low:+.1f}, {self.high:+.1f}]"
        others = [band for band in self.possible if band != self.band]
        more = f", though the interval reaches into {' and '.join(others)}" if others else ""
        alone = "; without an interval: too few seeds" if self.low is None else ""
        over = f"over {counted(self.seeds, 'seed')}"
        return f"{of}, {self.criterion.metric} {where}: {shown} {over}: {self.band}{more}{alone}"


def banded(suite: SuiteRuns, criteria: Sequence[Criterion]) -> tuple[Banded, ...]:
    """Return each criterion of a suite with what its runs give; runs without evidence do not count, and sides whose
    declared comparison is refused have no number."""
    refused = _refused(suite) if any(criterion.against for criterion in criteria) else {}
    return tuple(_measured(suite, criterion, refused.get((criterion.of, criterion.against))) for criterion in criteria)


def _refused(suite: SuiteRuns) -> dict[tuple[str, str | None], str]:
    """Return treatment and control -> why their declared comparison is refused, but for want of runs."""
    reasons: dict[tuple[str, str | None], str] = {}
    for answer in answer_all(suite_questions(suite, At()), lambda _run: None):
        why = [objection.sentence() for objection in answer.objections if objection.kind != "missing"]
        if why and answer.question.declaration is not None:
            declared = answer.question.declaration
            reasons[declared.treatment, declared.control] = why[0]
    return reasons


def _measured(suite: SuiteRuns, criterion: Criterion, refused: str | None) -> Banded:
    own = _numbers(suite, criterion, criterion.of)
    if criterion.against is None:
        unbounded = {} if criterion.metric == "accuracy" else {"least": -inf, "most": inf}
        mean = mean_over_seeds(own, **unbounded)
        if mean is None:
            return Banded(criterion, len(own))
        return Banded(criterion, len(own), mean.value, mean.low, mean.high)
    theirs = _numbers(suite, criterion, criterion.against)
    seeds = min(len(own), len(theirs))
    if not seeds:
        return Banded(criterion, 0)
    if refused is not None:
        return Banded(criterion, seeds, refused=refused)
    if seeds < 2 or len({*own, *theirs}) < 3:
        return Banded(criterion, seeds, fmean(own) - fmean(theirs))
    difference = welch(own, theirs)
    return Banded(criterion, seeds, difference.value, difference.low, difference.high)


def _numbers(suite: SuiteRuns, criterion: Criterion, side: str) -> list[float]:
    arm, _, profile = side.partition("@")
    values = (_number(run, criterion, profile) for run in suite.by_arm.get(arm, []) if run.counts)
    return [value for value in values if value is not None]


def _number(suite_run: SuiteRun, criterion: Criterion, profile: str) -> float | None:
    run = suite_run.run
    assert run is not None
    if criterion.metric == "accuracy":
        evaluation = run.evaluations(criterion.step).get(profile)
        return None if evaluation is None else 100 * evaluation.strict
    steps = suite_run.curves
    step = criterion.step if criterion.step is not None else max(steps, default=0)
    return steps.get(step, {}).get(criterion.metric)
