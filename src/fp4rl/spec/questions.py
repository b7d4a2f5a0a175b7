"""Check that a suite's questions name arms, profiles and keys that exist, before anything runs."""

from collections.abc import Iterable, Mapping

from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.experiment import Comparison, Experiment
from fp4rl.spec.keys import keys_at, wrong_part

_OWN_WORDS = ("precision",)  # a factor that is no key: the evaluation's


def check_questions(questions: tuple[Comparison, ...], arms: Mapping[str, Experiment], source: str) -> None:
    """Raise InvalidValueError for a side whose arm or profile is not in the suite, and for a factor that is no key."""
    for number, question in enumerate(questions):
        path = f"{source}: comparisons.{number}"
        for key, side in (("treatment", question.treatment), ("control", question.control)):
            _check_side(f"{path}.{key}", side, arms)
        if question.treatment == question.control:
            raise InvalidValueError(f"{path}: {question.treatment} is compared with itself; name two sides that differ")
        check_factors(question.factors, f"{path}.factors")


def check_factors(factors: Iterable[str], path: str) -> None:
    """Raise InvalidValueError for a factor that is neither a key of an experiment nor `precision`."""
    for factor in factors:
        parts = factor.split(".")
        wrong = None if factor in _OWN_WORDS else wrong_part(Experiment, parts)
        if wrong is not None:
            known = nearest(parts[wrong], keys_at(Experiment, parts[:wrong]))
            raise InvalidValueError(f"{path}: {factor!r} is no key{known}")


def _check_side(path: str, side: str, arms: Mapping[str, Experiment]) -> None:
    arm, _, profile = side.partition("@")
    if arm not in arms:
        raise InvalidValueError(f"{path}: no arm is called {arm!r}{nearest(arm, arms)}")
    evaluation = arms[arm].evaluation
    profiles = (*evaluation.profiles, *evaluation.sweep)
    if not profile:
        raise InvalidValueError(f"{path}: a side is written arm@profile; {arm} is judged as {', '.join(profiles)}")
    if profile not in profiles:
        raise InvalidValueError(
            f"{path}: {arm} is not judged as {profile!r}{nearest(profile, profiles)}; its evaluation.profiles say which"
        )
