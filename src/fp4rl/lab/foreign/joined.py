"""Joining the lines of a log by step: one step takes several lines, and a restarted trainer logs steps twice."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fp4rl.lab.foreign.plain import number, readable


@dataclass
class Joined:
    """Step -> name -> value, and what could not be taken over as it stood (nothing is dropped in silence).

    A trainer that is started again from a checkpoint goes back to an earlier step. The later attempt counts: what the
    earlier one logged from there on belongs to a policy that is gone.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # what is no number
    went_back: list[tuple[int, int]] = field(default_factory=list)  # (step reached, step it was started again at)
    met_twice: int = 0  # numbers that came again: the later one stands
    counted: bool = False  # the log names no steps: its lines are numbered
    _top: int = -1  # the highest step
    _last: int = -1  # the step of the line before
    _turn: int = -1  # where the lines last went back to; numbers that come again as they were show no new attempt yet
    _gone: dict[int, set[str]] = field(default_factory=dict)  # names of earlier attempts that have not come again

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Join what one line says of `step`; values that are no numbers are listed in `skipped`."""
        new = self._numbers(step, values)
        if not new:
            return
        known = self.steps.setdefault(step, {})
        common = known.keys() & new.keys()
        differ = {name for name in common if not _same(known[name], new[name])}
        back = step < self._top
        self._turn = step if step < self._last else self._turn
        self._last = step
        # Most of a line can be constants (a ratio that is 0, the learning rate). But a line of other names than its
        # step has is a second pass over the same attempt: a table in long form, another writer.
        if back and differ and (2 * len(differ) >= len(new) or 10 * len(common) >= 9 * len(new)):
            self._forget(step + 1, back_to=self._turn)
            if 2 * len(common) >= len(known):  # else it is a validation before the first step of the new attempt
                self._drop(step, known.keys() - new.keys())
        self.met_twice += len(common if back else differ) + len(self._gone.get(step, set()) & new.keys())
        if step in self._gone:
            self._gone[step] -= new.keys()
        known |= new
        self._top = max(self._top, step)

    def restarted(self, step: int) -> None:
        """The writer itself says that it goes on at `step`: what it had from there on is dropped."""
        if step <= self._top:
            self._forget(step, back_to=step)

    @property
    def left_behind(self) -> int:
        """Numbers of an earlier attempt to which the later one never came."""
        return sum(len(names) for names in self._gone.values())

    @property
    def names(self) -> list[str]:
        """Every name that some step has."""
        return sorted({name for values in self.steps.values() for name in values})

    def in_order(self) -> dict[int, dict[str, float]]:
        """Step -> name -> value, by step."""
        return dict(sorted(self.steps.items()))

    def remarks(self) -> list[str]:
        """What a reader must know of how the numbers were joined, a sentence each."""
        lines = ["the log names no steps: its lines are numbered"] if self.counted else []
        if self.went_back:
            times = "once," if len(self.went_back) == 1 else f"{len(self.went_back)} times, first"
            top, back = self.went_back[0]
            lines.append(f"the steps go back {times} from {top} to {back}: the later attempt counts")
        if self.met_twice:
            lines.append(f"{_count(self.met_twice)} met twice: the later one counts")
        if self.left_behind:
            lines.append(f"{_count(self.left_behind)} of an earlier attempt left out: the later one has none there")
        if self.skipped:
            lines.append(f"{len(self.skipped)} no number: {'; '.join(self.skipped[:3])}")
        return lines

    def _numbers(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, value in values.items():
            as_number = number(value)
            if as_number is None or name == "step":  # a line of metrics.jsonl gives that name to its own step
                self.skipped.append(readable(f"step {step}: {name}: {value}"[:80]))
            else:
                numbers[readable(name)] = as_number
        return numbers

    def _forget(self, first: int, back_to: int) -> None:
        self.went_back.append((self._top, back_to))
        for step in [step for step in self.steps if step >= first]:
            self._drop(step, self.steps[step].keys())
            del self.steps[step]
        self._top = max(self.steps, default=-1)

    def _drop(self, step: int, names: Iterable[str]) -> None:
        gone = set(names)
        self._gone.setdefault(step, set()).update(gone)
        for name in gone:
            self.steps[step].pop(name, None)


def _same(first: float, other: float) -> bool:
    return first == other or (math.isnan(first) and math.isnan(other))


def _count(numbers: int) -> str:
    return f"{numbers} number{'s were' if numbers != 1 else ' was'}"
