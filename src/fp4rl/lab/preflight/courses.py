"""Checks of the whole course of each arm, as its trainer takes it: rates, steps that are judged, budgets, seeds, and
what the arms of a question differ in by value."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import isclose, perm
from types import MappingProxyType

from fp4rl.lab.budget import Budget, budget_of
from fp4rl.lab.compare.differing import covered, differences, factors_between, undeclared
from fp4rl.lab.preflight.rehearsal import Rehearsed, rehearsed
from fp4rl.lab.preflight.rows import Check, Row, Subject, of_arms
from fp4rl.spec.experiment import Comparison, Experiment, Suite
from fp4rl.spec.words import counted

_RARE = 1e-4  # a coincidence below this chance is none
_OF_DATA = ("task", "model", "start", "training.filter_overlong_prompts", "training.max_prompt_length")
_OF_BATCHES = ("training.train_batch_size", "training.rollout_n")
_OF_UPDATES = ("training.steps", "training.epochs", "training.train_batch_size", "training.mini_batch_size")
# What arms are compared by -> the keys that are known to change it. Others may too, but for those that act in forwards.
_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "start weights": ("model", "start", "task"),
        "first batches": (*_OF_DATA, *_OF_BATCHES),
        "answers a step": _OF_BATCHES,
        "sampling": (
            "training.temperature",
            "training.top_p",
            "training.max_response_length",
            "training.stop",
            "task",
            "model",
            "start",
            "rollout",
        ),
        "problems judged": (*_OF_DATA, "evaluation"),
        "judging": ("evaluation", "task", "model", "start", "training.max_response_length", "training.stop"),
        "optimizer": (
            "training.optimizer",
            "training.lr",
            "training.betas",
            "training.weight_decay",
            "training.learned_clipping",
            "model",
            "start",
        ),
        "learning rate": ("training.lr", "training.lr_scheduler", "training.lr_warmup_steps", *_OF_UPDATES),
        "updates": _OF_UPDATES,
    }
)
_IN_FORWARDS = ("injection", "noise")
Look = Callable[[Rehearsed, Experiment], Iterator[Row]]


def _of_courses(look: Look) -> Callable[[Subject], Iterator[Row]]:
    return of_arms(rehearsed, lambda own: look(own, own.described) if own.described is not None else ())


def agenda(own: Rehearsed) -> Iterator[Row]:
    """Hold the steps that are judged on the way, and the step at which the trainer stops, against those described."""
    expected = "the last number is of the last step"
    if own.waits:
        yield Row("waits", own.waits, expected)
    elif own.described is None:
        yield Row("fail", own.error, expected)
    else:
        yield _judged(own, own.described, expected)


def _judged(own: Rehearsed, described: Experiment, expected: str) -> Row:
    steps, every = described.training.steps, described.evaluation.test_freq
    told = ", ".join(map(str, own.judged if len(own.judged) < 5 else (*own.judged[:2], "...", *own.judged[-1:])))
    measured = f"judged at steps 0{f', {told}' if told else ''} and {own.steps}, where the trainer stops"
    if own.steps != steps:
        cure = "report it: a fault of fp4rl, or another version of trl"
        return Row("fail", f"{measured}, of {counted(steps, 'step')}", expected, cure)
    uneven = {b - a for a, b in pairwise((0, *own.judged))} - {every}
    if uneven or (every and not own.judged and every < steps) or steps - max(own.judged, default=0) > (every or steps):
        return Row("fail", measured, f"each evaluation.test_freq {every}", "report it: a fault of fp4rl")
    return Row("pass", measured, expected)


def warm_up(own: Rehearsed, described: Experiment) -> Iterator[Row]:
    """Count the updates before the learning rate is at its largest, as optimizer and schedule give it."""
    recipe, largest = described.training, max(own.rates)
    rising = own.rates.index(largest)
    steps = rising / recipe.updates_per_step
    expected = f"{recipe.lr:g} after {counted(recipe.lr_warmup_steps, 'step')}, at most a fifth of them"
    measured = (
        f"lr rises to {largest:.4g} in {steps:g} of {counted(recipe.steps, 'step')}, and ends at {own.rates[-1]:.4g}"
    )
    if not isclose(largest, recipe.lr, rel_tol=1e-6):
        yield Row("fail", measured, expected, "fewer training.lr_warmup_steps: the run ends before its rate is reached")
    elif steps != recipe.lr_warmup_steps:
        yield Row("fail", measured, expected, "report it: a fault of fp4rl, or another version of transformers")
    elif steps > recipe.steps / 5:
        yield Row("warn", measured, expected, "fewer training.lr_warmup_steps")
    else:
        yield Row("pass", measured, expected)


def budget(own: Rehearsed, described: Experiment) -> Iterator[Row]:
    """Count the updates to the end of the run, and the answers of its first step, and hold both against what is
    described."""
    made = Budget(own.steps, len(own.rates), own.steps * len(own.draws[0].prompts))
    due = budget_of(described)
    cure = "" if made == due else "report it: a fault of fp4rl, or another version of trl"
    yield Row("pass" if made == due else "fail", made.sentence(), due.sentence(), cure)


def seeds(own: Rehearsed, _: Experiment) -> Iterator[Row]:
    """Compare the first batch of two seeds, and what both answer to the same problems."""
    first, second = own.draws
    expected = "another seed draws other batches, and other answers"
    distinct = len(dict.fromkeys(first.prompts))
    wired = {
        "batch": first.prompts != second.prompts or 1 / perm(own.problems, min(distinct, own.problems)) > _RARE,
        "answers": first.answers != second.answers or first.chance > _RARE,
    }
    still = [what for what, acts in wired.items() if not acts]
    if still:
        measured = f"another seed draws the same {' and '.join(still)}"
        yield Row("fail", f"{measured}, so that n seeds are one run", expected, "report it: a fault of fp4rl")
    elif first.answers == second.answers:
        measured = f"another batch; the answers are the same, which has a chance of {first.chance:.2g} in this model"
        yield Row("warn", measured, expected, "a higher training.temperature, if repeats are to tell anything")
    else:
        yield Row("pass", f"another batch of {counted(own.problems, 'problem')}, other answers to one batch", expected)


def alike(subject: Subject) -> Iterator[Row]:
    """Compare by value, at one seed, what the arms of each question start from, learn from and are judged by."""
    suite, courses = subject.described, rehearsed(subject)
    questions = suite.comparisons if isinstance(suite, Suite) else ()
    expected = "equal values, but for what the factors change"
    seen = 0
    clean = True
    for number, question in enumerate(questions, 1):
        arms = _arms(question)
        if arms[0] == arms[1] or any(arm not in courses or courses[arm].described is None for arm in arms):
            continue
        for row in _apart(number, question, subject, courses):
            clean = False
            yield row
        seen += 1
    if seen and clean:
        names = len({name for own in courses.values() for name in own.values})
        yield Row(
            "pass", f"{counted(seen, 'question')}: {counted(names, 'value')} of each arm as they should be", expected
        )


def _apart(number: int, question: Comparison, subject: Subject, courses: Mapping[str, Rehearsed]) -> Iterator[Row]:
    """Yield a row for each value in which the arms of a question differ and may not."""
    arms = _arms(question)
    first, second = (courses[arm].values for arm in arms)
    differing = differences(*(subject.arms[arm].model_dump(mode="json") for arm in arms))
    more = undeclared(differing, factors_between(question.treatment, question.control, question.factors))
    for name in (name for name in first if name in second and first[name] != second[name]):
        keys = [key for key in differing if covered(key, _KEYS[name])]
        measured = f"question {number}: {name} differ: {first[name]} against {second[name]}"
        expected = f"{name} alike, or a factor that changes them"
        if not keys and all(covered(key, _IN_FORWARDS) for key in differing):
            yield Row("fail", measured, expected, "nothing that is described makes them differ", arms)
        elif not keys:
            cure = f"{', '.join(differing)} is not known to change them: look whether it should"
            yield Row("warn", measured, expected, cure, arms)
        elif all(key in more for key in keys):
            yield Row("warn", measured, expected, f"make {', '.join(keys)} alike, or a factor", arms)


def _arms(question: Comparison) -> tuple[str, str]:
    return question.treatment.partition("@")[0], question.control.partition("@")[0]


CHECKS = (
    Check("agenda", ("P19",), of_arms(rehearsed, agenda)),
    Check("warm-up", ("P32",), _of_courses(warm_up)),
    Check("budget", ("P46",), _of_courses(budget)),
    Check("two seeds", ("P21",), _of_courses(seeds)),
    Check("alike", ("P20", "P46"), alike),
)
