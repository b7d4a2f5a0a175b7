"""What each arm cost: runs, steps, time, and tokens generated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fp4rl.lab.budget import budget_of
from fp4rl.lab.compare.beforehand import beforehand
from fp4rl.lab.spent import over_steps, sum_known
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.records import RunResult


@dataclass(frozen=True)
class Cost:
    """All finished runs of an arm together, in seconds; None where a run did not record it.

    `wall_s`, `cpu_s` (of the first process) and `gpu_s` are of the attempts that finished, evaluations included;
    `training_s` and `rollout_s` are of all steps. `answers` are those sampled to train on, also the groups that dynamic
    sampling dropped, `tokens` those of all their rollouts. `steps_in_all` are those of one run with its stages and
    teachers, as planned; None where one of them is not here.
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
    tokens: float | None
    device: str
    steps_in_all: int | None = None


def costs(by_arm: Mapping[str, Sequence[SuiteRun]], root: Path) -> list[Cost]:
    """Return the cost of every arm with a finished run, and of all of them together (arm "all"); stages that are runs
    of other suites are looked up below `root`."""
    arms = {arm: runs[0].planned.experiment for arm, runs in by_arm.items()}
    rows = [
        replace(_cost(arm, own), steps_in_all=None if before is None else budget_of(*before.whole, arms[arm]).steps)
        for arm, runs in by_arm.items()
        if (own := [run for run in runs if run.run is not None])
        for before in [beforehand(arms[arm], arms, root)]
    ]
    return [*rows, _together(rows)] if len(rows) > 1 else rows


def _cost(arm: str, runs: Sequence[SuiteRun]) -> Cost:
    results = [run.run.result for run in runs if run.run is not None]
    steps = [step for run in runs for step in run.curves.values()]
    answers = [_answers(step) for step in steps]
    return Cost(
        arm=arm,
        runs=len(results),
        steps=sum(result.steps_done or 0 for result in results),
        wall_s=sum(result.wall_s or 0.0 for result in results),
        cpu_s=sum_known(result.cpu_s for result in results),
        gpu_s=sum_known(map(_gpu_s, results)),
        training_s=sum(_of(step, "time/step_s") for step in steps),
        rollout_s=sum(_of(step, "time/rollout_s") for step in steps),
        answers=round(sum(answers)),
        tokens=sum_known(
            over_steps(run.curves, "tokens/rollout", run.run.result.steps_done) for run in runs if run.run
        ),
        device=", ".join(sorted({result.device or "not recorded" for result in results})),
    )


def _together(rows: Sequence[Cost]) -> Cost:
    added = ("runs", "steps", "wall_s", "training_s", "rollout_s", "answers")
    sums = {name: sum(getattr(row, name) for row in rows) for name in added}
    devices = sorted({name for row in rows for name in row.device.split(", ")})
    sums |= {name: sum_known(getattr(row, name) for row in rows) for name in ("cpu_s", "gpu_s", "tokens")}
    return Cost(arm="all", device=", ".join(devices), **sums)


def _gpu_s(result: RunResult) -> float | None:
    if result.device is None or result.wall_s is None:
        return None
    return 0.0 if result.device == "cpu" else result.wall_s * (result.evidence.processes or 1)


def _answers(step: Mapping[str, float]) -> float:
    """Return the answers sampled in a step: those of its first generation, times its groups over that one's."""
    answers, groups = _of(step, "rollout/answers"), _of(step, "rollout/groups")
    generated = _of(step, "sampling/generated_groups")
    return answers * generated / groups if groups and generated else answers


def _of(step: Mapping[str, float], name: str) -> float:
    value = step.get(name, 0.0)
    return value if math.isfinite(value) else 0.0
