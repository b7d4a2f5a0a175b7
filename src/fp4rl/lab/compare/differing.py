"""In which keys two descriptions differ, and which of these a question lets differ; known before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp4rl.spec.experiment import Suite
from fp4rl.spec.linked import START, TEACHER
from fp4rl.spec.load import arm_contents

# Each of these is one factor as a whole, however many of its keys differ.
_WHOLE = ("injection", "noise", START, TEACHER)
STEPS = "training.steps"
# Where what trains differs, so do its losses' details and its libraries; where steps differ, so does the step that is
# compared: no difference that is meant in silence.
_DECLARED = ("engine", STEPS)
# Which profiles are measured changes no number; the conditions of a number are compared with the number.
_NO_FACTOR = ("evaluation.profiles", "evaluation.injections")

# Where arms differ in nothing but these, how long and how they train is the question itself.
_OF_TRAINING = tuple(
    f"training.{key}"
    for key in (
        "steps",
        "epochs",
        "train_batch_size",
        "mini_batch_size",
        "rollout_n",
        "lr_scheduler",
        "lr_warmup_steps",
    )
)

Differences = dict[str, tuple[Any, Any]]


def refused_beforehand(suite: Suite) -> Iterator[str]:
    """Yield a line for each question of a suite that will be refused: its arms differ in more than its factors."""
    arms = {arm: experiment.model_dump(mode="json") for arm, experiment in arm_contents(suite)}
    for number, question in enumerate(suite.comparisons, 1):
        treatment, control = (arms[side.partition("@")[0]] for side in (question.treatment, question.control))
        factors = factors_between(question.treatment, question.control, question.factors)
        if more := undeclared(differences(treatment, control), factors):
            whole = ", ".join(dict.fromkeys(map(factor_of, more)))
            yield (
                f"question {number} will be refused: its arms also differ in {', '.join(more)}; where they may, its "
                f"factors must name {whole}"
            )


def factors_between(treatment: str, control: str, factors: Sequence[str]) -> tuple[str, ...]:
    """Return `factors` completed by those that always or usually come with them.

    `evaluation.profiles` is always added: which profiles an arm is evaluated under changes no number. `precision` is
    added where the question is about it: `full` on one side (4 bits against BF16), or `deployment` on both sides with
    different injections (each as it is served).
    """
    profiles = [side.partition("@")[2] for side in (treatment, control)]
    precision = "full" in profiles and len(set(profiles)) > 1
    if profiles == ["deployment", "deployment"]:
        precision = any(factor.partition(".")[0] == "injection" for factor in factors)
    return tuple(dict.fromkeys((*factors, "evaluation.profiles", *(["precision"] if precision else []))))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Differences:
    """Return dotted key -> (value in the first, value in the second)."""
    differing = dict(_differ(first, second, ""))
    return {key: pair for key, pair in differing.items() if key != "seed" and not covered(key, _NO_FACTOR)}


def undeclared(differing: Differences, factors: Sequence[str]) -> Differences:
    """Return the differences that no declared factor covers.

    Where none is declared, one factor may differ: one key but the engine and the steps, or the injection or the noise
    as a whole.
    """
    if factors:
        return {key: pair for key, pair in differing.items() if not covered(key, factors)}
    several = len({factor_of(key) for key in differing}) > 1
    return differing if several or any(key in differing for key in _DECLARED) else {}


def about_training(differing: Differences) -> bool:
    """Return whether all that differs is how long arms train, and by which schedule."""
    return bool(differing) and all(covered(key, _OF_TRAINING) for key in differing)


def covered(key: str, factors: Sequence[str]) -> bool:
    """Return whether one of the factors is the key itself or stands above it."""
    return any(key == factor or key.startswith(f"{factor}.") for factor in factors)


def factor_of(key: str) -> str:
    """Return the factor that a key belongs to when none is declared."""
    return next((whole for whole in _WHOLE if covered(key, [whole])), key)


def in_few_words(value: Any) -> str:
    """Return a value in few words."""
    text = "none" if value is None else str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _differ(first: Any, second: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys((*first, *second)):
            yield from _differ(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif first != second:
        yield path, (first, second)
