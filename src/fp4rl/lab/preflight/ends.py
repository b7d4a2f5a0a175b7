"""Checks of what the fake steps end in: numbers of the last policy, as many updates as described, and treatments whose
policies differ."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from fp4rl.lab.compare.differing import covered, differences
from fp4rl.lab.compare.fairness import training_part
from fp4rl.lab.preflight.copies import STEPS
from fp4rl.lab.preflight.rows import Check, Row, Subject
from fp4rl.lab.preflight.steps import of_steps, tried
from fp4rl.lab.runs import Run
from fp4rl.spec.evidence import MasterCheck, RolloutNoise
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.words import counted

# What acts in every step, however small. All else may have had no reason to: a ratio beyond its bound, an answer that
# is too long, noise under which no other token is drawn.
_EACH_STEP = (
    *(f"training.{key}" for key in ("lr", "optimizer", "temperature", "distillation", "learned_clipping", "ema")),
    *(f"training.{key}" for key in ("rollout_n", "train_batch_size", "mini_batch_size")),
    *(f"injection.{point}" for point in ("weight", "input")),
    "start",
    "task",
)


def last(run: Run, _: Any) -> Iterator[Row]:
    """Compare the weights that the last evaluations answered with against those before any training."""
    expected = f"judged after step {STEPS}, with the weights that were trained"
    checked = [line for line in run.of(MasterCheck) if line.phase == "evaluation"]
    start, end = ({str(line.digest) for line in checked if line.step == step} for step in (0, STEPS))
    steps = sorted({evaluation.step for evaluation in run.result.evaluations if evaluation.last})
    if steps != [STEPS] or not end:
        told = ", ".join(map(str, steps)) or "none"
        yield Row("fail", f"the last numbers are of step {told} of {STEPS}", expected, "report it: a fault of fp4rl")
    elif start & end:
        yield Row(
            "fail",
            f"judged at last: the weights of step 0, {min(start & end)}",
            expected,
            "report it: a fault of fp4rl",
        )
    else:
        yield Row(
            "pass",
            f"weights {', '.join(sorted(start))} judged at step 0, {', '.join(sorted(end))} at step {STEPS}",
            expected,
        )


def work(run: Run, own: Any) -> Iterator[Row]:
    """Count the updates that the optimizer made, and the answers and tokens that were sampled for them."""
    recipe = Experiment.model_validate(run.spec).training
    names = ("rollout/answers", "sampling/generated_groups", "tokens/rollout")
    answers, groups, tokens = (int(sum(line[name] for line in run.curves.values())) for name in names)
    drawn = f"{groups * recipe.rollout_n} drawn with {counted(tokens, 'token')}"
    measured = f"{counted(len(own.rates), 'update')} from {counted(answers, 'answer')}, {drawn}"
    due = STEPS * recipe.updates_per_step, STEPS * recipe.train_batch_size * recipe.rollout_n
    expected = f"{counted(due[0], 'update')} from {counted(due[1], 'answer')}"
    cure = "" if (len(own.rates), answers) == due else "report it: a fault of fp4rl, or another version of trl"
    yield Row("fail" if cure else "pass", measured, expected, cure)


def apart(subject: Subject) -> Iterator[Row]:
    """Hold the trained weights of the arms of each question, or of all arms, against each other."""
    runs = {arm: own.run for arm, own in tried(subject).items() if own.run is not None}
    pairs = [pair for pair in _pairs(subject) if all(arm in runs for arm in pair)]
    rows = [row for pair in pairs if (row := _apart(pair, subject.arms, runs)) is not None]
    expected = "treatments that end in different policies"
    yield from rows
    if pairs and not rows:
        yield Row("pass", f"{counted(len(pairs), 'pair')} of arms, none with the same weights", expected)


def _pairs(subject: Subject) -> list[tuple[str, str]]:
    suite = subject.described
    asked_about = [
        tuple(sorted(side.partition("@")[0] for side in (question.treatment, question.control)))
        for question in (suite.comparisons if isinstance(suite, Suite) else ())
    ]
    pairs = dict.fromkeys(asked_about or combinations(subject.arms, 2))
    return [(a, b) for a, b in pairs if a != b]


def _apart(pair: tuple[str, str], arms: Mapping[str, Experiment], runs: Mapping[str, Run]) -> Row | None:
    """Return what is wrong with a pair of arms; None where their policies differ, or their training does not."""
    expected, (first, second) = "treatments that end in different policies", (runs[arm] for arm in pair)
    if first.result.evidence.final_weights != second.result.evidence.final_weights:
        return None
    whole = [training_part(arms[arm].model_dump(mode="json")) for arm in pair]
    meant = ", ".join(differences(*whole))
    keys = differences(*(training_part(run.spec) for run in (first, second)))
    silent = not any(line.sigma for run in (first, second) for line in run.of(RolloutNoise))
    at_work = [key for key in keys if not (covered(key, ("noise",)) and silent)]
    if not meant:
        return None
    if not at_work:
        return Row("waits", f"{meant}: beyond {STEPS} small steps, which end alike", expected, "", pair)
    named = f"both end in weights {first.result.evidence.final_weights}, whatever {', '.join(at_work)}"
    if any(_acts_each_step(key, keys[key]) for key in at_work):
        return Row("fail", named, expected, "what differs is wired to nothing: two names of one recipe", pair)
    told = f"{named}: in {STEPS} small steps it changed nothing"
    return Row("warn", told, expected, "see `fp4rl keys` for when it acts, or try more of it", pair)


def _acts_each_step(key: str, sides: Sequence[Any]) -> bool:
    """Return whether what differs under a key acts in every step; of an injection, formats of weights or inputs do."""
    if key == "injection":
        return any(side.get(point) is not None for side in sides if side for point in ("weight", "input"))
    return covered(key, _EACH_STEP)


CHECKS = (
    Check("last", ("P19",), of_steps(last)),
    Check("work", ("P46",), of_steps(work)),
    Check("apart", ("P48",), apart),
)
