"""What the training of two sides took, and whether more of it alone may explain what lies between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp4rl.lab.budget import COUNTED, DECAYING, differing
from fp4rl.lab.compare.differing import about_training, differences
from fp4rl.lab.compare.sides import Side
from fp4rl.lab.spent import NOTHING, Spending, Spent, TotalSpent, added
from fp4rl.lab.stages import link_of
from fp4rl.spec.linked import START, TEACHER
from fp4rl.spec.words import counted


@dataclass(frozen=True)
class Budgets:
    """What a run of each side took, as the mean over its runs, and the names of both.

    `about_it`: the sides differ in nothing but how long, and by which schedule, they train. `one_start`, `one_teacher`:
    both take it from the same run, whether that is here or not. `schedules`: how the learning rate of each goes, where
    one decays and the other does not.
    """

    treatment: TotalSpent
    control: TotalSpent
    names: tuple[str, str]
    about_it: bool = False
    one_start: bool = True
    one_teacher: bool = True
    schedules: tuple[str, str] | None = None

    @property
    def differing(self) -> str | None:
        """The count in which the sides differ by more than the tolerance: steps, updates or answers."""
        return differing(*self._compared())

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
            sides = zip((self.treatment, self.control), self._counts(name), strict=True)
            each = (_amount(side, name, number or 0) for side, number in sides)
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
        first, second = self._compared()
        return getattr(first, name), getattr(second, name)

    def _compared(self) -> tuple[Spent, Spent]:
        """Return what both took, stages and teachers included as far as they are known or differ."""
        first, second = self.treatment.in_all, self.control.in_all
        if not any(getattr(side, name) is None for side in (first, second) for name in COUNTED):
            return first, second
        return self._without_common(self.treatment), self._without_common(self.control)

    def _without_common(self, side: TotalSpent) -> Spent:
        stages, teacher = NOTHING if self.one_start else side.stages, NOTHING if self.one_teacher else side.teacher
        return added([side.own, stages, teacher or NOTHING])


def budgets(treatment: Side, control: Side, spending: Spending) -> Budgets:
    """Return what both sides took. Raises `Damaged` for files that cannot be read."""
    first, second = (spending.mean(own.run for own in side.runs) for side in (treatment, control))
    return Budgets(
        first,
        second,
        names=(treatment.name.partition("@")[0], control.name.partition("@")[0]),
        about_it=about_training(differences(treatment.spec, control.spec)),
        one_start=treatment.spec.get(START) == control.spec.get(START),
        one_teacher=link_of(treatment.spec, TEACHER) == link_of(control.spec, TEACHER),
        schedules=_schedules(treatment.spec, control.spec),
    )


def _schedules(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, str] | None:
    names = [(spec.get("training") or {}).get("lr_scheduler", "constant") for spec in (first, second)]
    return (names[0], names[1]) if (names[0] in DECAYING) != (names[1] in DECAYING) else None


def _amount(side: TotalSpent, name: str, number: float) -> str:
    parts = [word for word, of in (("stages", side.stages), ("teacher", side.teacher)) if of is not None and of.steps]
    words = counted(round(number), name.removesuffix("s"))
    return f"{words} with its {' and '.join(parts)}" if parts else words
