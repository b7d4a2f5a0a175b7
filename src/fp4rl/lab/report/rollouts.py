"""The answers that runs kept of their rollouts: for each arm those of one run, step by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fp4rl.lab.files import Damaged, json_ready
from fp4rl.lab.suites import SuiteRun

MOST_TEXT, MOST_CHARACTERS = 500, 100_000
MOST_ARMS, MOST_RUNS, MOST_STEPS, MOST_ANSWERS = 8, 4, 25, 4


@dataclass(frozen=True)
class ArmRollouts:
    """The answers that one run of an arm kept: step -> answers. `steps`: how many steps it kept answers of."""

    arm: str
    seed: int
    steps: int
    by_step: Mapping[int, Sequence[Mapping[str, Any]]]


def rollouts_of(by_arm: Mapping[str, Sequence[SuiteRun]]) -> list[ArmRollouts]:
    """Return the answers of the first run of each arm that kept some, at most MOST_ARMS arms and MOST_STEPS steps."""
    kept: list[ArmRollouts] = []
    for runs in by_arm.values():
        own = next(filter(None, map(_kept, runs[:MOST_RUNS])), None)
        if own is not None:
            kept.append(own)
        if len(kept) == MOST_ARMS:
            break
    return _within(kept)


def _within(kept: list[ArmRollouts]) -> list[ArmRollouts]:
    """Return the same with fewer steps of each, until their texts hold at most MOST_CHARACTERS."""
    most = MOST_STEPS
    while most > 2 and sum(map(_characters, kept)) > MOST_CHARACTERS:
        most = most * 2 // 3
        kept = [replace(own, by_step={n: own.by_step[n] for n in spread(list(own.by_step), most)}) for own in kept]
    return kept


def _characters(own: ArmRollouts) -> int:
    texts = ("question", "gold", "completion")
    return sum(len(str(answer.get(name))) for step in own.by_step.values() for answer in step for name in texts)


def _kept(run: SuiteRun) -> ArmRollouts | None:
    try:
        steps = run.folder.rollouts()
    except Damaged:
        return None
    if not steps:
        return None
    chosen = spread(list(steps), MOST_STEPS)
    shown = {step: [_shown(answer) for answer in steps[step][:MOST_ANSWERS]] for step in chosen}
    return ArmRollouts(run.planned.arm, run.planned.seed, len(steps), shown)


def _shown(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cut(value) if isinstance(value, str) else json_ready(value) for name, value in answer.items()}


def spread(values: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]


def cut(text: str) -> str:
    """Return at most MOST_TEXT characters, with a word on how many more there were."""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} [{len(text) - MOST_TEXT} more characters]"
