"""What the training of two sides took, and whether more of it alone may explain what lies between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4rl.lab.budget import DECAYING, beyond
from fp4rl.lab.compare.differing import about_training, differences
from fp4rl.lab.compare.sides import Side
from fp4rl.lab.spent import Spending, TotalSpent
from fp4rl.spec.linked import START
from fp4rl.spec.words import counted

_COUNTED = ("steps", "updates", "answers")


@dataclass(frozen=True)
class Budgets:
    """What a run of each side took, as the mean over its runs, and the names of both.

    `about_it`: the sides differ in nothing but how long, and by which schedule, they train. `one_start`: both start
    from the same run, whether that is here or not. `schedules`: how the learning rate of each goes, where one decays
    and the other does not.
    """

    treatment: TotalSpent
    control: TotalSpent
    names: tuple[str, str]
    about_it: bool = False
    one_start: bool = True
    schedules: tuple[str, str] | None = None

    @property
    def differing(self) -> str | None:
        """The first count in which the sides differ by more than the tolerance: steps, updates or answers."""
        pairs = ((name, self._counts(name)) for name in _COUNTED)
        return next((name for name, (a, b) in pairs if a is not None and b is not None and beyond(a, b)), None)

    @property
    def equal(self) -> bool | None:
        """Whether both train for as long; None where a stage is not here, so that nobody knows."""
        if self.differing:
            return False
        return None if None in self._counts("steps") else True

    @property
    def larger(self) -> bool:
        """Whether the treatment trains for longer."""
        first, second = self._counts(self.differing or "steps")
        return bool(self.differing) and (first or 0) > (second or 0)

    @property
    def confounded(self) -> bool:
        """Whether other training than the control's may explain a difference that is about something else (P46)."""
        return not self.about_it and (not self.equal or self.schedules is not None)

    def sentence(self) -> str | None:
        """Return what is unequal, in words; None where nothing is."""
        parts = []
        if (name := self.differing) is not None:
            each = (_amount(side, name) for side in (self.treatment, self.control))
            parts.append("at unequal budget: " + ", ".join(map("{} took {}".format, self.names, each)))
        elif self.equal is None:
            parts.append("at a budget that is not known: the runs of a stage are not here")
        if self.schedules is not None:
            parts.append("at unequal schedule: {} against {}".format(*self.schedules))
        if parts and self.confounded:
            which = "more" if self.larger else "less" if self.differing else "other"
            parts.append(f"{which} training alone may explain it")
        return "; ".join(parts) or None

    def _counts(self, name: str) -> tuple[float | None, float | None]:
        """Return a count of both sides, stages included as far as they are known or differ."""
        first, second = (getattr(side.whole, name) for side in (self.treatment, self.control))
        if self.one_start and None in (first, second):
            return getattr(self.treatment.own, name), getattr(self.control.own, name)
        return first, second


def budgets(treatment: Side, control: Side, spending: Spending) -> Budgets:
    """Return what both sides took. Raises `Damaged` for files that cannot be read."""
    first, second = (spending.mean(own.run for own in side.runs) for side in (treatment, control))
    return Budgets(
        first,
        second,
        names=(treatment.name.partition("@")[0], control.name.partition("@")[0]),
        about_it=about_training(differences(treatment.spec, control.spec)),
        one_start=treatment.spec.get(START) == control.spec.get(START),
        schedules=_schedules(treatment.spec, control.spec),
    )


def _schedules(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str] | None:
    names = [(spec.get("training") or {}).get("lr_scheduler", "constant") for spec in (first, second)]
    return (names[0], names[1]) if (names[0] in DECAYING) != (names[1] in DECAYING) else None


def _amount(side: TotalSpent, name: str) -> str:
    number = counted(round(getattr(side.whole, name)), name.removesuffix("s"))
    return f"{number} with its stages" if side.stages.steps else number
