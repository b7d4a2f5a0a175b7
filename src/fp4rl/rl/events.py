"""What a run reports while it goes on: one stream of typed events, handed to one function. None can change a number.

A line of evidence is an event too (`spec.evidence`). No torch: whoever shows a run reads these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4rl.spec.evidence import Evidence
from fp4rl.spec.records import Sites

if TYPE_CHECKING:
    from fp4rl.rl.evaluate import Evaluation


class Interrupted(Exception):
    """Somebody asked the run to end; what it has done is kept, and the same command goes on from there."""


@dataclass(frozen=True)
class Progress:
    """A stage is at `done` of `total` (0: unknown)."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """`step` training steps are done; `metrics` are those of the last one."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """One profile was evaluated."""

    evaluation: "Evaluation"


@dataclass(frozen=True)
class SitesResolved:
    """The table of sites that the injection came to."""

    sites: Sites


@dataclass(frozen=True)
class StepsDropped:
    """The run went back: what was done after `step` counts no more."""

    step: int


@dataclass(frozen=True)
class Message:
    """A line that people must read; `log_only`: one for the log alone."""

    line: str
    log_only: bool = False


Event = Progress | StepDone | Evaluated | SitesResolved | StepsDropped | Message | Evidence
Emit = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Hand to a run that nobody follows."""


def never() -> bool:
    """Hand to a run that nobody interrupts."""
    return False
