"""What the training of finished runs took, as they recorded it: their own, their stages', a teacher's."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fp4rl.lab.runs import Curves, Run, read_run
from fp4rl.lab.stages import link_of, taken_from
from fp4rl.spec.linked import START, TEACHER
from fp4rl.spec.training import Training


@dataclass(frozen=True)
class Spent:
    """What training took, evaluations left out; None where it was not recorded, and never a guess.

    `steps`, optimizer `updates` and the `answers` they learned from are those in the weights. All else also counts
    `repeated` steps, which an interruption or a rollback made vain: `tokens` of all rollouts, `cpu_s` and `gpu_s` of
    all processes, `wall_s` by the clock. GPUs of a rollout server are not known to the run.
    """

    steps: float | None = None
    updates: float | None = None
    answers: float | None = None
    repeated: float | None = None
    tokens: float | None = None
    cpu_s: float | None = None
    gpu_s: float | None = None
    wall_s: float | None = None


_NAMES = tuple(each.name for each in fields(Spent))
NOTHING, NOT_KNOWN = Spent(**dict.fromkeys(_NAMES, 0)), Spent()


@dataclass(frozen=True)
class TotalSpent:
    """What one run took: its `own` training, that of the `stages` that it starts from, and that of a `teacher` that was
    trained for it, without what is among the stages already, as where it starts from what teaches it.

    A run that taught a stage is among the stages. `teacher` is None where nothing was trained for it besides, `stages`
    and `teacher` are NOT_KNOWN where a run of them is not here any more.
    """

    own: Spent
    stages: Spent = NOTHING
    teacher: Spent | None = None

    @property
    def whole(self) -> Spent:
        """Its own training and its stages."""
        return added([self.own, self.stages])

    @property
    def in_all(self) -> Spent:
        """All that led to its weights, a teacher's training included: what budgets are compared by."""
        return added([self.whole, self.teacher or NOTHING])


_Runs = dict[str, Run] | None  # by their keys; None where one is not here


class Spending:
    """Reads what runs took. A run that several start from is read once, and none of `runs`, which were read before."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._runs = {run.folder: run for run in runs if run.folder is not None}
        self._known: dict[str, TotalSpent] = {}
        self._own: dict[str, Spent] = {}

    def of(self, run: Run) -> TotalSpent:
        """Return what a run took. Raises `Damaged` for files that cannot be read."""
        if run.key not in self._known:
            stages = self._source(run, START)
            taught = {} if _one_link(run) else self._source(run, TEACHER)
            besides = None if taught is None else {key: own for key, own in taught.items() if key not in (stages or {})}
            teacher = None if besides == {} else self._sum(besides)
            self._known[run.key] = TotalSpent(self._spent(run), self._sum(stages), teacher)
        return self._known[run.key]

    def mean(self, runs: Iterable[Run]) -> TotalSpent:
        """Return the means over runs that are repeats of each other."""
        totals = list(map(self.of, runs))
        teachers = [total.teacher for total in totals if total.teacher is not None]
        own, stages = (_mean([getattr(total, name) for total in totals]) for name in ("own", "stages"))
        return TotalSpent(own, stages, _mean(teachers) if teachers else None)

    def _source(self, run: Run, key: str) -> _Runs:
        """Return the run whose weights a run takes under a key, and all that led to it."""
        if link_of(run.spec, key) is None:
            return {}
        if (folder := taken_from(run, key)) is None:
            return None
        source = self._runs[folder] = self._runs.get(folder) or read_run(folder)
        before = [self._source(source, name) for name in (START, TEACHER)]
        return (
            None if None in before else {k: r for own in before for k, r in (own or {}).items()} | {source.key: source}
        )

    def _sum(self, runs: _Runs) -> Spent:
        return NOT_KNOWN if runs is None else added(map(self._spent, runs.values()))

    def _spent(self, run: Run) -> Spent:
        if run.key not in self._own:
            self._own[run.key] = spent(run)
        return self._own[run.key]


def _one_link(run: Run) -> bool:
    """Return whether what teaches a run is what it starts from, be that here or not."""
    start, teacher = link_of(run.spec, START), link_of(run.spec, TEACHER)
    return bool(start and teacher) and all((start or {}).get(k) == (teacher or {}).get(k) for k in ("arm", "digest"))


def spent(run: Run) -> Spent:
    """Return what the training of one run took, without its stages."""
    steps, recipe = run.result.steps_done, run.spec.get("training")
    curves = run.curves or (run.folder.metrics() if run.folder is not None else {})
    attempts = run.folder.attempts() if run.folder is not None else []
    again = {name: _repeated(attempts, f"repeats_{name}") for name in ("steps", "tokens", "cpu_s", "s")}
    wall_s = sum_known([over_steps(curves, "time/step_s", steps), again["s"]])
    updates, answers = _each_step(recipe) if recipe is not None else (None, None)
    return Spent(
        steps=steps,
        updates=_times(steps, updates),
        answers=_times(steps, answers),
        repeated=again["steps"],
        tokens=sum_known([over_steps(curves, "tokens/rollout", steps), again["tokens"]]),
        cpu_s=sum_known([over_steps(curves, "time/cpu_s", steps), again["cpu_s"]]),
        gpu_s=_times(wall_s, _gpus(run)),
        wall_s=wall_s,
    )


def added(parts: Iterable[Spent]) -> Spent:
    """Return the sum of what was spent; what one did not record is not known of the sum."""
    known = list(parts)
    return Spent(**{name: sum_known([getattr(part, name) for part in known]) for name in _NAMES})


def sum_known(values: Iterable[float | None]) -> float | None:
    """Return the sum; None where one of the values is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def over_steps(curves: Curves, name: str, steps: int | None) -> float | None:
    """Return the sum of a metric over all steps; None where one of them did not log it."""
    values = [step[name] for step in curves.values() if math.isfinite(step.get(name, math.nan))]
    return sum(values) if len(values) == steps else None


def _mean(parts: list[Spent]) -> Spent:
    sums = added(parts)
    values = {name: getattr(sums, name) for name in _NAMES}
    return Spent(**{name: None if value is None else value / len(parts) for name, value in values.items()})


def _each_step(recipe: Mapping[str, Any]) -> tuple[float, float]:
    """Return the updates and answers of a step."""
    names = ("train_batch_size", "mini_batch_size", "rollout_n")
    prompts, an_update, answers = (recipe.get(name, Training.model_fields[name].default) for name in names)
    return prompts // an_update, prompts * answers


def _gpus(run: Run) -> float | None:
    """Return the GPUs that a run's processes held; None where that is not recorded."""
    server = (run.spec.get("rollout") or {}).get("server")
    if run.result.device is None or server is not None:
        return None
    return 0.0 if run.result.device == "cpu" else run.result.evidence.processes


def _repeated(attempts: list[dict[str, Any]], name: str) -> float | None:
    """Return the sum over attempts of what was repeated; older ones kept no more than steps and seconds."""
    return sum_known([each.get(name) if each.get("repeats_steps") else 0 for each in attempts]) if attempts else None


def _times(number: float | None, factor: float | None) -> float | None:
    return None if number is None or factor is None else number * factor
