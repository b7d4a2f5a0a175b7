"""Who hears what while a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fp4rl.rl.evaluate import Evaluation
from fp4rl.spec.evidence import Evidence
from fp4rl.spec.records import Sites


class Interrupted(Exception):
    """Somebody asked the run to end; what it has done is kept, and the same command goes on from there."""


def _ignore(*_: Any) -> None:
    return


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Listeners:
    """Every one is optional; none can change a number.

    `on_stage(name, done, total)`, `on_step(steps done, metrics)`, `on_evaluation(evaluation)`, `record(evidence)`,
    `on_sites(table)`, `on_rollback(steps done that stay)`, `say(line)` for what people must hear, `note(line)` for the
    log alone.
    """

    on_stage: Callable[[str, int, int], None] = _ignore
    on_step: Callable[[int, dict[str, float]], None] = _ignore
    on_evaluation: Callable[[Evaluation], None] = _ignore
    record: Callable[[Evidence], None] = _ignore
    on_sites: Callable[[Sites], None] = _ignore
    on_rollback: Callable[[int], None] = _ignore
    say: Callable[[str], None] = _ignore
    note: Callable[[str], None] = _ignore
    interrupted: Callable[[], bool] = _never
