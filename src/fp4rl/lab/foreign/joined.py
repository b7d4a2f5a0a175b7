"""Numbers of one step arrive in several lines; joined, no later line takes the place of an earlier number."""

import math
from dataclasses import dataclass, field


@dataclass
class Joined:
    """Step -> name -> value, and what could not be taken over as it stood (nothing is dropped without being listed)."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)  # "name at step": met again with another value, the first stays
    skipped: list[str] = field(default_factory=list)  # what is no number

    def add(self, step: int, name: str, value: float) -> None:
        values = self.steps.setdefault(step, {})
        if name == "step":  # the name that a line of metrics.jsonl gives to its own step
            self.skipped.append(f"step {step}: a number called 'step'")
            return
        kept = values.setdefault(name, value)
        if kept != value and not (math.isnan(kept) and math.isnan(value)):
            self.conflicts.append(f"{name} at step {step}")

    @property
    def names(self) -> list[str]:
        return sorted({name for values in self.steps.values() for name in values})

    def in_order(self) -> dict[int, dict[str, float]]:
        return dict(sorted(self.steps.items()))
