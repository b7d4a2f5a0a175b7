"""What a check is asked about, and its answer: a row with the measured value, the expected one and the cure."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.errors import CheckFailed, UserError
from fp4rl.spec.experiment import Experiment, Suite

Verdict = Literal["pass", "warn", "fail", "waits"]
Needs = Literal["nothing", "model", "weights"]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked: the runs that are planned, what describes them, and where and with which loggers they will run.

    Experiments are compared by `arm`: its seeds differ in nothing that a check before the run could see.
    """

    described: Suite | Experiment
    runs: tuple[PlannedRun, ...]
    root: Path
    report_to: tuple[str, ...] = ()

    @property
    def firsts(self) -> tuple[PlannedRun, ...]:
        """The first run of each arm."""
        return tuple({run.arm: run for run in reversed(self.runs)}.values())[::-1]

    @cached_property
    def arms(self) -> dict[str, Experiment]:
        """The experiment of each arm, of its first seed."""
        return {run.arm: run.experiment for run in self.firsts}

    def each(self, words: Callable[[Experiment], str | None]) -> str:
        """Return what the arms have, each wording once."""
        return "; ".join(dict.fromkeys(filter(None, map(words, self.arms.values()))))


@dataclass(frozen=True)
class Row:
    """One answer. `waits`: it needs what is not here. `arms`: those that it is about, none where it is all."""

    verdict: Verdict
    measured: str
    expected: str
    cure: str = ""
    arms: tuple[str, ...] = ()
    check: str = ""
    traps: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One check by name, with the numbers of the traps that it is about."""

    name: str
    traps: tuple[str, ...]
    run: Callable[[Subject], Iterator[Row]]

    def rows(self, subject: Subject) -> tuple[Row, ...]:
        """Return its rows; a mistake of the user that it meets is a row that fails. No row: it does not apply."""
        try:
            rows = tuple(self.run(subject))
        except (UserError, CheckFailed) as error:
            rows = (Row("fail", str(error), "no such error"),)
        every = len(subject.arms)
        return tuple(
            replace(row, check=self.name, traps=self.traps, arms=row.arms if len(row.arms) < every else ())
            for row in rows
        )


class Once(Generic[_T]):
    """What `make` returns for a subject, made once: several checks look at it. `kept` holds it by subject."""

    def __init__(self, make: Callable[[Subject], _T]) -> None:
        self._make = make
        self._by = WeakKeyDictionary[Subject, Callable[[], _T]]()
        self.kept = WeakKeyDictionary[Subject, _T]()

    def __call__(self, subject: Subject) -> _T:
        """Return what is kept of a subject, or make it."""
        if subject not in self.kept:
            by = self._by.pop(subject, None)
            self.kept[subject] = self._make(subject) if by is None else by()
        return self.kept[subject]

    def made_by(self, subject: Subject, make: Callable[[], _T]) -> None:
        """Let `make`, which has another process to help it, make it of a subject when it is asked for."""
        self._by[subject] = make


def of_arms(
    made: Callable[[Subject], Mapping[str, _T]], look: Callable[[_T], Iterable[Row]]
) -> Callable[[Subject], Iterator[Row]]:
    """Return a check that looks at what is made of each arm."""
    return lambda subject: merged((arm, row) for arm, own in made(subject).items() for row in look(own))


def merged(rows: Iterable[tuple[str, Row]]) -> Iterator[Row]:
    """Yield each row of (arm, row) once, with the arms that share it."""
    shared: dict[Row, list[str]] = {}
    for arm, row in rows:
        shared.setdefault(row, []).append(arm)
    return (replace(row, arms=tuple(dict.fromkeys(arms))) for row, arms in shared.items())
