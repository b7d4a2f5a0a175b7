"""The histories of a run's signals, and the robust statistics that checks compare."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, isfinite
from statistics import median
from typing import Any

from fp4rl.rl.health.signals import NAMES
from fp4rl.spec.health import Thresholds

# Answers to one prompt are correlated, since prompts differ in difficulty: this is the correlation if difficulties are
# uniform. Healthy runs of the embedded model have .17 to .33.
_ALIKE = 1 / 3
_USUAL_GROUP = 8
_LARGEST_GRAIN = 64
_ENOUGH = 8
_DIFFERENT = 4
_ROUNDING = 1e-4


def grain(values: Sequence[float]) -> int | None:
    """Return the smallest number of cases n that such shares can be of: every value is a whole multiple of 1 / n.

    None where no n up to 64 fits, where values lie outside 0..1, and where too few different ones were seen.
    """
    if len(values) < _ENOUGH or not all(0 <= value <= 1 for value in values):
        return None
    distinct = {round(value, 6) for value in values[-200:]}
    sizes = range(1, _LARGEST_GRAIN + 1)
    cases = next((n for n in sizes if all(abs(v * n - round(v * n)) < n * _ROUNDING for v in distinct)), None)
    return cases if cases is not None and len(distinct) >= max(2, min(cases, _DIFFERENT)) else None


def independent(answers: float, groups: float | None) -> float:
    """Return the effective sample size of `answers` in `groups` of one prompt each: n / (1 + rho (m - 1))."""
    groups = groups or max(1.0, answers / _USUAL_GROUP)
    return answers / (1 + _ALIKE * max(answers / groups - 1, 0.0))


def sampling_error(share: float, cases: float) -> float:
    """Return the standard error of a share over independent cases; never 0, since few cases make nothing certain."""
    share = min(max(share, 1 / (cases + 2)), 1 - 1 / (cases + 2))
    return float((share * (1 - share) / cases) ** 0.5)


# Standard deviation / median absolute deviation of normal values; differences of two values have sqrt(2) of it.
_MAD_TO_SD = 1.4826
_SQRT2 = 2**0.5
NOISE_WINDOW = 30
_SMOOTH = 5
_FALL = 3
LEVELS = (2, 3, 5, 10, 20)
"""The widths, in observations, of the windows whose means are compared."""


class SignalHistory:
    """The values of one signal in order of observation, and statistics of them, None after too few observations."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.bests: dict[int, float] = {}  # width -> the highest mean of so many; `learning.lost` corrects for luck
        self.lowest: float | None = None  # running median of five
        self._total = [0.0]  # of the first n values

    def add(self, step: int, value: float) -> None:
        """Add one observation; a value that is not finite is left out."""
        if not isfinite(value):
            return
        self.steps.append(step)
        self.values.append(value)
        self._total.append(self._total[-1] + value)
        if len(self.values) >= 3:
            smooth = median(self.values[-_SMOOTH:])
            self.lowest = smooth if self.lowest is None else min(self.lowest, smooth)
        for width in LEVELS:
            mean = self.mean(width)
            if mean is not None:
                self.bests[width] = max(self.bests.get(width, mean), mean)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float | None:
        """The newest value; None before there is one."""
        return self.values[-1] if self.values else None

    @property
    def spacing(self) -> float:
        """The median number of steps between observations; 1 before there are two."""
        recent = self.steps[-NOISE_WINDOW:]
        return max(1.0, median(b - a for a, b in pairwise(recent))) if len(recent) > 1 else 1.0

    def mean(self, width: int) -> float | None:
        """Return the mean of the last `width` observations; None before there are as many."""
        n = len(self.values)
        return (self._total[n] - self._total[n - width]) / width if 0 < width <= n else None

    def start(self, width: int) -> float:
        """Return the mean of the first `width` observations; there must be as many."""
        return self._total[width] / width

    def early(self, most: int) -> float | None:
        """Return the median of the first quarter of the observations, so that an early failure is not the reference.

        At least 3 observations, and at most those of `most` steps; None before there are 4.
        """
        n, limit = len(self.values), round(most / self.spacing)
        return median(self.values[: max(3, min(limit, n // 4))]) if n >= 4 else None

    def level(self, width: int = 3, ago: int = 0, least: int | None = None) -> float | None:
        """Return the median of `width` observations up to `ago` before the last; of fewer where `least` are enough."""
        end = max(len(self.values) - ago, 0)
        window = self.values[max(end - width, 0) : end]
        return median(window) if len(window) >= (least or width) else None

    def level_at(self, step: int) -> float | None:
        """Return the median of the last 3 observations up to `step`."""
        window = [v for s, v in zip(self.steps, self.values, strict=True) if s <= step][-3:]
        return median(window) if window else None

    def noise(self) -> float | None:
        """Return the standard deviation by differences of neighbours: jumps hardly change it, a trend does not."""
        window = self.values[-NOISE_WINDOW:]
        if len(window) < 4:
            return None
        steps = [b - a for a, b in pairwise(window)]
        middle = median(steps)
        return _MAD_TO_SD * median(abs(s - middle) for s in steps) / _SQRT2

    def spread(self) -> float:
        """Return the larger of `noise` and the plain standard deviation; 0 before it is known.

        Shares of few answers are often 0 or 1 twice in a row, and the median of such differences is 0. The last few
        observations are left out, so that a fall is not part of the noise that it is compared with.
        """
        window = self.values[: max(len(self.values) - _FALL, 4)][-NOISE_WINDOW:]
        steps = [b - a for a, b in pairwise(window)]
        plain = (sum(s * s for s in steps) / len(steps)) ** 0.5 / _SQRT2 if steps else 0.0
        return max(plain, self.noise() or 0.0)


def trend(values: list[float]) -> tuple[float, float] | None:
    """Fit a robust line (Theil-Sen): level at the last value, and slope per observation; None below 4 values."""
    n = len(values)
    if n < 4:
        return None
    slope = median((values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n))
    return median(v + slope * (n - 1 - i) for i, v in enumerate(values)), slope


# Groups of answers in a mean that no single prompt dominates.
POOLED_GROUPS = 8


class SignalHistories:
    """One `SignalHistory` per signal, empty for a signal that is not logged.

    `groups`: groups of answers a step. `independent`: the effective sample size of its answers.
    """

    def __init__(self) -> None:
        self._of = {signal: SignalHistory() for signal in NAMES}
        self._lines = SignalHistory()
        self.now: Mapping[str, float] = {}
        # Per step, as logged or as derived from the shares; None where unknown.
        self.groups: float | None = None
        self.independent: float | None = None
        self.loss: Any = None  # the result of `learning.lost` for this step, once computed

    def add(self, step: int, signals: Mapping[str, float]) -> None:
        """Add the signals of one step; `now` keeps them as they are, non-finite ones too."""
        self.now, self.loss = signals, None
        self._lines.add(step, 0.0)
        for signal, value in signals.items():
            self._of[signal].add(step, value)
        self.groups = self["groups"].last or grain(self["no_spread"].values)
        answers = self["answers"].last or grain(self.goal.values)
        self.independent = independent(answers, self.groups) if answers else None

    @property
    def spacing(self) -> float:
        """The usual number of steps between two lines of the log."""
        return self._lines.spacing

    def __getitem__(self, signal: str) -> SignalHistory:
        return self._of[signal]

    def value(self, signal: str) -> float | None:
        """Return the signal in the present step; None when this step does not have it."""
        return self._of[signal].last if signal in self.now else None

    @property
    def goal(self) -> SignalHistory:
        """What the run shall improve: rollout accuracy, or the reward where accuracy is not logged."""
        return self["accuracy"] if len(self["accuracy"]) else self["reward"]

    @property
    def is_share(self) -> bool:
        """Whether the goal has a zero to fall to: accuracy, or a reward that has never been negative."""
        return len(self["accuracy"]) > 0 or min(self["reward"].values, default=0.0) >= 0

    def pooled(self, signal: str, groups: int = POOLED_GROUPS, unknown: float = POOLED_GROUPS) -> float | None:
        """Return the mean of a signal over so many of the last steps that they hold `groups` groups of answers.

        `unknown`: groups a step where that is not known. None when the present step does not have the signal, or there
        are too few steps yet.
        """
        return self[signal].mean(ceil(groups / (self.groups or unknown))) if signal in self.now else None

    def width(self) -> int:
        """Return how many steps hold enough groups of answers that no single prompt dominates their mean."""
        return ceil(POOLED_GROUPS / (self.groups or POOLED_GROUPS))


def summary(histories: SignalHistories, signals: tuple[str, ...]) -> str:
    """Describe in a few words how `signals` developed, and which of them are not logged."""
    logged = [name for name in signals if len(histories[name])]
    seen = [f"{name} {histories[name].values[0]:.3g} -> {histories[name].last:.3g}" for name in logged]
    unseen = [name for name in signals if name not in logged]
    beside = [f"no {' or '.join(unseen)} logged"] if unseen else []
    if "accuracy" in unseen and len(histories["reward"]) and "reward" not in signals:
        beside.append(f"goes by {summary(histories, ('reward',))}")
    return ", ".join([*seen, *beside])


def lacking(histories: SignalHistories, needs: tuple[tuple[str, ...], ...]) -> str:
    """Name the metrics that a check lacks, one of which must be logged; empty where nothing is lacking."""
    missing = [signals for signals in needs if not any(len(histories[signal]) for signal in signals)]
    return "; ".join(f"needs {' or '.join(n for signal in signals for n in NAMES[signal])}" for signals in missing)


def rising(histories: SignalHistories, ago: int = 5) -> bool:
    """Return whether accuracy rose in the last `ago` observations by more than its noise."""
    goal = histories.goal
    now, before = goal.level(3), goal.level(3, ago)
    return now is not None and before is not None and now - before > (goal.noise() or 0.0)


def solved(histories: SignalHistories, t: Thresholds) -> bool:
    """Return whether accuracy is so high that a missing learning signal means success."""
    level = histories["accuracy"].level(1)
    return level is not None and level >= t.solved
