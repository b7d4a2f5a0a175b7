"""What each arm cost: runs, steps, time, and tokens generated."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.records import RunResult


@dataclass(frozen=True)
class Cost:
    """All finished runs of an arm together, in seconds; None where a run did not record it.

    `wall_s`, `cpu_s` (of the first process) and `gpu_s` are of the attempts that finished, evaluations included;
    `training_s` and `rollout_s` are of all steps. `answers` are those sampled to train on, also the groups that dynamic
    sampling dropped; `tokens` takes the mean length of each step's first generation.
    """

    arm: str
    runs: int
    steps: int
    wall_s: float
    cpu_s: float | None
    gpu_s: float | None
    training_s: float
    rollout_s: float
    answers: int
    tokens: int
    device: str


def costs(by_arm: Mapping[str, Sequence[SuiteRun]]) -> list[Cost]:
    """Return the cost of every arm with a finished run, and of all of them together (arm "all")."""
    rows = [_cost(arm, own) for arm, runs in by_arm.items() if (own := [run for run in runs if run.run is not None])]
    return [*rows, _together(rows)] if len(rows) > 1 else rows


def _cost(arm: str, runs: Sequence[SuiteRun]) -> Cost:
    results = [run.run.result for run in runs if run.run is not None]
    steps = [step for run in runs for step in run.curves.values()]
    answers = [_answers(step) for step in steps]
    lengths = [_of(step, "response_length/mean") for step in steps]
    return Cost(
        arm=arm,
        runs=len(results),
        steps=sum(result.steps_done or 0 for result in results),
        wall_s=sum(result.wall_s or 0.0 for result in results),
        cpu_s=_total(result.cpu_s for result in results),
        gpu_s=_total(map(_gpu_s, results)),
        training_s=sum(_of(step, "time/step_s") for step in steps),
        rollout_s=sum(_of(step, "time/rollout_s") for step in steps),
        answers=round(sum(answers)),
        tokens=round(sum(count * length for count, length in zip(answers, lengths, strict=True))),
        device=", ".join(sorted({result.device or "not recorded" for result in results})),
    )


def _together(rows: Sequence[Cost]) -> Cost:
    added = ("runs", "steps", "wall_s", "training_s", "rollout_s", "answers", "tokens")
    sums = {name: sum(getattr(row, name) for row in rows) for name in added}
    devices = sorted({name for row in rows for name in row.device.split(", ")})
    cpu_s, gpu_s = (_total(getattr(row, name) for row in rows) for name in ("cpu_s", "gpu_s"))
    return Cost(arm="all", device=", ".join(devices), cpu_s=cpu_s, gpu_s=gpu_s, **sums)


def _gpu_s(result: RunResult) -> float | None:
    if result.device is None or result.wall_s is None:
        return None
    return 0.0 if result.device == "cpu" else result.wall_s * (result.evidence.processes or 1)


def _answers(step: Mapping[str, float]) -> float:
    """Return the answers sampled in a step: those of its first generation, times its groups over that one's."""
    answers, groups = _of(step, "rollout/answers"), _of(step, "rollout/groups")
    generated = _of(step, "sampling/generated_groups")
    return answers * generated / groups if groups and generated else answers


def _total(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _of(step: Mapping[str, float], name: str) -> float:
    value = step.get(name, 0.0)
    return value if math.isfinite(value) else 0.0
