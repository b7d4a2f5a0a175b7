"""What a step logs: one number out of those of its micro-batches and processes, and where its time went."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

# Of a micro-batch these are its part of an update's, so that they add up.
_IN_PARTS = {"policy_loss", "kl_loss"}
# Of a process these are its part of the step's.
_COUNTS = {"rollout/groups", "rollout/answers", "sampling/generated_groups", "sampling/trained_groups"}
# Means over answers; every other one is a mean over tokens.
_OF_ANSWERS = {
    f"rollout_corr/{name}"
    for name in ("chi2_seq", "training_ppl", "rollout_ppl", "log_ppl_diff", "log_ppl_abs_diff", "ppl_ratio")
}


class StepMeans:
    """Collects the metrics of micro-batches and updates until `take`.

    A mean weighs by the tokens (or answers) that it was taken over; a micro-batch without any has no mean to give. A
    maximum stays the largest, a minimum the smallest, a loss is the sum of its parts over the updates.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = defaultdict(list)  # (value, weight)

    def add(self, metrics: Mapping[str, float], mask: Tensor) -> None:
        """The metrics of one micro-batch, taken over the tokens that `mask` [answers, tokens] counts."""
        of_each = mask.sum(-1)
        tokens, answers = float(of_each.sum()), float((of_each > 0).sum())
        for name, value in metrics.items():
            if name in _IN_PARTS:
                self._values[name].append((value, 1.0))
            elif tokens:
                self._values[name].append((value, answers if name in _OF_ANSWERS else tokens))

    def add_update(self, **values: float) -> None:
        """What an optimizer step says once."""
        for name, value in values.items():
            self._values[name].append((value, 1.0))

    def take(self, updates: int) -> dict[str, float]:
        """Return the metrics of the step, which made `updates`; the next one begins."""
        means = {name: _combined(name, values, updates) for name, values in self._values.items()}
        self._values.clear()
        return means


def _combined(name: str, values: list[tuple[float, float]], updates: int) -> float:
    if name in _IN_PARTS:
        return sum(value for value, _ in values) / updates
    if name in _COUNTS:
        return sum(value for value, _ in values)
    if "max" in name or "_min" in name:
        return (max if "max" in name else min)(value for value, _ in values)
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def joined(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Make one line of metrics out of those of all processes: counts are added, the rest are means."""
    names = dict.fromkeys(name for line in lines for name in line)
    values = {name: [(line[name], 1.0) for line in lines if name in line] for name in names}
    return {name: _combined(name, of_each, len(of_each)) for name, of_each in values.items()}


class StepTimer:
    """Books every moment under the lap that ends next, so that laps add up to the whole."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._sums: dict[str, float] = defaultdict(float)

    def restart(self) -> None:
        """Book what went by since the last lap under nothing."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self._sums[name] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Return seconds by name since the last call, and begin anew."""
        sums = dict(self._sums)
        self._sums.clear()
        return sums
