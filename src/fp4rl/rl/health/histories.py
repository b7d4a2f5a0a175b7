"""All signals of one run, and the one question every check asks of them: is the policy getting worse?"""

from collections.abc import Mapping
from math import ceil
from typing import Any

from fp4rl.rl.health.history import SignalHistory
from fp4rl.rl.health.shares import grain, independent
from fp4rl.rl.health.signals import NAMES
from fp4rl.spec.health import Thresholds

# Groups of answers that a mean needs before one prompt no longer makes it.
POOLED_GROUPS = 8


class SignalHistories:
    """One `SignalHistory` per signal; a signal nobody logs has an empty one.

    `groups`: of answers a step. `independent`: its answers, counted as independent ones.
    """

    def __init__(self) -> None:
        self._of = {signal: SignalHistory() for signal in NAMES}
        self._lines = SignalHistory()
        self.now: Mapping[str, float] = {}
        # Per step, as logged or as the shares let on; None where nobody knows.
        self.groups: float | None = None
        self.independent: float | None = None
        self.loss: Any = None  # what `loss.lost` found in this step, once it was asked

    def add(self, step: int, signals: Mapping[str, float]) -> None:
        """The signals of one more step; `now` keeps them as they came, non-finite ones too."""
        self.now, self.loss = signals, None
        self._lines.add(step, 0.0)
        for signal, value in signals.items():
            self._of[signal].add(step, value)
        self.groups = self["groups"].last or grain(self["no_spread"].values)
        answers = self["answers"].last or grain(self.goal.values)
        self.independent = independent(answers, self.groups) if answers else None

    @property
    def spacing(self) -> float:
        """Steps between two lines of the log, as a rule."""
        return self._lines.spacing

    def __getitem__(self, signal: str) -> SignalHistory:
        return self._of[signal]

    def value(self, signal: str) -> float | None:
        """The signal in this very step, None when this step does not have it."""
        return self._of[signal].last if signal in self.now else None

    @property
    def goal(self) -> SignalHistory:
        """What the run is for: rollout accuracy, or the reward where nobody logs accuracy."""
        return self["accuracy"] if len(self["accuracy"]) else self["reward"]

    @property
    def is_share(self) -> bool:
        """Whether the goal has a zero to fall to: accuracy, or a reward that has never been negative."""
        return len(self["accuracy"]) > 0 or min(self["reward"].values, default=0.0) >= 0

    def pooled(self, signal: str, groups: int = POOLED_GROUPS, unknown: float = POOLED_GROUPS) -> float | None:
        """The signal over as many of the last steps as hold `groups` groups of answers; this very step where it does.

        `unknown`: how many a step has where nobody knows. None when this step does not have the signal, or there are
        too few steps yet.
        """
        return self[signal].mean(ceil(groups / (self.groups or unknown))) if signal in self.now else None

    def width(self) -> int:
        """How many steps hold enough groups of answers that one prompt no longer makes their mean."""
        return ceil(POOLED_GROUPS / (self.groups or POOLED_GROUPS))


def summary(histories: SignalHistories, signals: tuple[str, ...]) -> str:
    """Say in a few words how `signals` went, and which of them nobody logs."""
    logged = [name for name in signals if len(histories[name])]
    seen = [f"{name} {histories[name].first:.3g} -> {histories[name].last:.3g}" for name in logged]
    unseen = [name for name in signals if name not in logged]
    beside = [f"no {' or '.join(unseen)} logged"] if unseen else []
    if "accuracy" in unseen and len(histories["reward"]) and "reward" not in signals:
        beside.append(f"goes by {summary(histories, ('reward',))}")
    return ", ".join([*seen, *beside])


def lacking(histories: SignalHistories, needs: tuple[tuple[str, ...], ...]) -> str:
    """Name the metrics of which a check needs at least one and none is logged; empty where every group has one.

    A check without data is no good news.
    """
    missing = [signals for signals in needs if not any(len(histories[signal]) for signal in signals)]
    return "; ".join(f"needs {' or '.join(n for signal in signals for n in NAMES[signal])}" for signals in missing)


def rising(histories: SignalHistories, ago: int = 5) -> bool:
    """Whether accuracy is above what it was `ago` observations ago by more than its noise."""
    goal = histories.goal
    now, before = goal.level(3), goal.level(3, ago)
    return now is not None and before is not None and now - before > (goal.noise() or 0.0)


def solved(histories: SignalHistories, t: Thresholds) -> bool:
    """Whether so much is right that an empty learning signal is a success."""
    level = histories["accuracy"].level(1)
    return level is not None and level >= t.solved
