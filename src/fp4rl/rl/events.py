"""What a run reports while it runs: one stream of typed events, passed to one function. No event changes a number.

A line of evidence is an event too (`spec.evidence`). No torch is imported: displays of runs use these types.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4rl.spec.evidence import Evidence
from fp4rl.spec.records import Sites

if TYPE_CHECKING:
    from fp4rl.rl.answered import Evaluation


class Interrupted(Exception):
    """Raised when the run was asked to end; what it has done is kept, and the same command resumes it."""


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
class SampledAnswer:
    """One answer of a rollout, with its problem, as a reader sees them; `tokens` counts those generated."""

    problem_id: str
    question: str
    gold: str
    completion: str
    tokens: int
    truncated: bool
    reward: float
    strict: bool


@dataclass(frozen=True)
class Sampled:
    """A few answers of the rollout of `step` (the first is 1), for people; no number derives from them."""

    step: int
    answers: tuple[SampledAnswer, ...]


@dataclass(frozen=True)
class Evaluated:
    """One profile was evaluated."""

    evaluation: "Evaluation"


@dataclass(frozen=True)
class SitesResolved:
    """The injection was resolved to this table of sites."""

    sites: Sites


@dataclass(frozen=True)
class StepsDropped:
    """The run went back: the steps after `step` no longer count."""

    step: int


@dataclass(frozen=True)
class Message:
    """A line for whoever started the run; with `log_only` for the log alone."""

    line: str
    log_only: bool = False


Event = Progress | StepDone | Sampled | Evaluated | SitesResolved | StepsDropped | Message | Evidence
Emit = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Drop an event: for a run whose events nobody needs."""


def never() -> bool:
    """Return False: for a run that is not interrupted."""
    return False
