"""The metrics of a step, combined from its micro-batches and processes, and where its time went."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fp4rl.spec.errors import require_finite
from fp4rl.spec.precision import PrecisionSchedule

# A micro-batch's value is its part of the update's value, so these are added.
_IN_PARTS = {"policy_loss", "kl_loss"}
# A process's value is its part of the step's value, so these are added.
_COUNTS = {
    *("rollout/groups", "rollout/answers", "sampling/generated_groups", "sampling/trained_groups"),
    *("tokens/rollout", "time/cpu_s"),
    *(f"injection/{point}_rounded" for point in PrecisionSchedule.model_fields),
}
# These are means over answers, all others over tokens.
_OF_ANSWERS = {
    f"rollout_corr/{name}"
    for name in ("chi2_seq", "training_ppl", "rollout_ppl", "log_ppl_diff", "log_ppl_abs_diff", "ppl_ratio")
}


class StepMeans:
    """Collects the metrics of micro-batches and updates until `take`.

    Means are weighted by the tokens (or answers) that they were taken over; a micro-batch without any has no mean. Of
    maxima the largest counts, of minima the smallest; a loss is the sum of its parts, divided by the updates.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = defaultdict(list)  # (value, weight)

    def add(self, metrics: Mapping[str, float], mask: Tensor) -> None:
        """Add the metrics of one micro-batch over the tokens that `mask` [answers, tokens] counts. Raises NotFinite."""
        require_finite("loss", metrics)
        of_each = mask.sum(-1)
        tokens, answers = float(of_each.sum()), float((of_each > 0).sum())
        for name, value in metrics.items():
            if name in _IN_PARTS:
                self._values[name].append((value, 1.0))
            elif tokens:
                self._values[name].append((value, answers if name in _OF_ANSWERS else tokens))

    def add_update(self, **values: float) -> None:
        """Add values that an optimizer step has once."""
        for name, value in values.items():
            self._values[name].append((value, 1.0))

    def take(self, updates: int) -> dict[str, float]:
        """Return the metrics of a step of `updates` updates, and begin the next one."""
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


def finite_norm(norm: Tensor) -> Tensor:
    """Return the norm of an update's gradient, added up over processes where weights are sharded; NotFinite where a
    weight would become NaN of it."""
    norm = getattr(norm, "full_tensor", lambda: norm)()
    require_finite("before the update", {"grad_norm": float(norm)})
    return norm


def joined(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combine the metrics of all processes into one line: counts are added, the rest are means."""
    names = dict.fromkeys(name for line in lines for name in line)
    values = {name: [(line[name], 1.0) for line in lines if name in line] for name in names}
    return {name: _combined(name, of_each, len(of_each)) for name, of_each in values.items()}


def clocks() -> tuple[float, float]:
    """Return seconds by the clock and of this process's CPUs, both from an arbitrary start."""
    return time.perf_counter(), time.process_time()


class StepTimer:
    """Books all time under the lap that ends next, so that the laps add up to the whole."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._sums: dict[str, float] = defaultdict(float)

    def restart(self) -> None:
        """Drop the time since the last lap."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self._sums[name] += now - self._last
        self._last = now

    def take(self) -> dict[str, float]:
        """Return seconds by name since the last call, and start again from 0."""
        sums = dict(self._sums)
        self._sums.clear()
        return sums
