"""The equal-budget controls that a suite lacks: arms that train as long as a treatment, to be pasted into its file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fp4rl.lab.budget import DECAYING, Budget, as_arm, beyond, budget_of, differing, equal_control, unequal
from fp4rl.lab.compare.beforehand import Beforehand, beforehand
from fp4rl.lab.compare.differing import about_training, covered, differences, factor_of, factors_between, undeclared
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Comparison, Experiment, Suite
from fp4rl.spec.load import arm_contents, load_spec, read_yaml
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.compare.comparison import Answer  # and with it scipy, which a plan does without


@dataclass(frozen=True)
class MissingControl:
    """A question whose treatment trains for longer than its control, or by a learning rate that decays where the
    control's does not (`decays`), and the question that would be at equal budget.

    `treatment`, `control`: what both train, `beforehand` what of the former is before its own. `equal`: the question
    against the arm `name` of `steps` steps, which trains `made` with what is trained for it too. `overrides` of the
    suite's base make that arm; None where the suite has it, and where none can be written, as beside axes.
    """

    question: Comparison
    treatment: Budget
    control: Budget
    beforehand: Beforehand
    decays: bool
    equal: Comparison
    name: str
    steps: int
    made: Budget
    present: bool
    overrides: Mapping[str, Any] | None

    @property
    def arms(self) -> tuple[str, str]:
        """The arms of treatment and control."""
        return _arm(self.question.treatment), _arm(self.question.control)

    def sentence(self) -> str:
        """Return why it is needed, and what to do."""
        own, other = self.arms
        count = differing(self.treatment, self.control) or "steps"
        first, second = (counted(getattr(b, count), count.removesuffix("s")) for b in (self.treatment, self.control))
        told = f"control arm {other} has {second}, the treatment {own} {first}{self.beforehand.words()}"
        told += " and a learning rate that decays" * self.decays
        if self.present:
            return f"{told}: compare it with {self.equal.control}, which trains as long"
        told += f": add an arm of {counted(self.steps, 'step')}"
        if (name := differing(self.made, self.treatment)) is None:
            return told
        word = counted(getattr(self.made, name), name.removesuffix("s"))
        return f"{told}, which takes {word}, since no whole batches make updates and answers equal"

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain values for JSON."""
        comparison = self.equal.model_dump(mode="json", exclude_defaults=True)
        return {"sentence": self.sentence(), "arm": self.name, "overrides": self.overrides, "comparison": comparison}

    def as_yaml(self) -> str:
        """Return what is to be added to the suite's file: the arm, if it is not there, and the question."""
        arms = {} if self.overrides is None else {"arms": {self.name: dict(self.overrides)}}
        question = self.equal.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(arms | {"comparisons": [question]}, sort_keys=False, width=100)


def missing_controls(
    suite: Suite, root: Path, questions: Sequence[Comparison] | None = None
) -> Iterator[MissingControl]:
    """Yield what each of the `questions` between arms of a suite, by default its own, lacks to be at equal budget; a
    pair of arms once.

    Nothing is lacking where how long arms train is the question itself, where the suite asks against such a control
    already, and where nobody knows, since a stage is a run that is not below `root`.
    """
    arms = dict(arm_contents(suite))
    known = {name: beforehand(own, arms, root) for name, own in arms.items()}
    before = {name: own for name, own in known.items() if own is not None}
    whole = {name: budget_of(*own.whole, arms[name]) for name, own in before.items()}
    for question in _pairs(suite.comparisons if questions is None else questions):
        own, other = _arm(question.treatment), _arm(question.control)
        if not (own in whole and other in whole) or about_training(_between(arms[own], arms[other])):
            continue
        decays = _decays(arms[own]) and not _decays(arms[other])
        if not (_larger(whole[own], whole[other]) or (decays and not unequal(whole[own], whole[other]))):
            continue
        made, kept = _made(arms[own], before[own], arms[other], arms, root)
        best = budget_of(*kept, made)
        alike = [
            name
            for name, budget in whole.items()
            if _same_treatment(arms[name], arms[other]) and (budget == best or not unequal(budget, whole[own]))
            if _decays(arms[name]) or not _decays(arms[own])
        ]
        if any(_arm(q.treatment) == own and _arm(q.control) in alike for q in suite.comparisons):
            continue
        made = arms[alike[0]] if alike else made
        name = alike[0] if alike else _free(f"{other}_equal", made, suite)
        yield MissingControl(
            question=question,
            treatment=whole[own],
            control=whole[other],
            beforehand=before[own],
            decays=decays,
            equal=_against(question, name, arms[own], made),
            name=name,
            steps=made.training.steps,
            made=whole[alike[0]] if alike else best,
            present=bool(alike),
            overrides=None if alike else _overrides(made, suite),
        )


def _made(
    own: Experiment, before: Beforehand, like: Experiment, arms: Mapping[str, Experiment], root: Path
) -> tuple[Experiment, tuple[Experiment, ...]]:
    """Return the control of equal budget that treats as `like` does, and what is trained for that control too."""
    start = like.start if like.start == own.start else None
    needed = beforehand(like.model_copy(update={"start": start}), arms, root)
    kept = needed.whole if needed is not None else ()
    return equal_control(own, before.whole, like, kept), kept


def lacking(answers: "Sequence[Answer]", folder: Path) -> list[MissingControl]:
    """Return what answers between arms of the suite in `folder` lack to be at equal budget; nothing where its file
    describes no arms."""
    confounded = [a for a in answers if a.budgets is not None and a.budgets.confounded]
    questions = [_question(a) for a in confounded if a.treatment.suite == a.control.suite]
    file = folder / "suite.yaml"
    if not (questions and file.is_file() and "arms" in read_yaml(file)):
        return []
    suite = load_spec(file)
    assert isinstance(suite, Suite)
    return list(missing_controls(suite, folder.resolve().parent, questions))


def _question(answer: "Answer") -> Comparison:
    first, second = (
        f"{side.runs[0].run.arm}@{side.runs[0].measured.profile.name}" for side in (answer.treatment, answer.control)
    )
    label = answer.question.label or f"{first} against {second}"
    return answer.question.declaration or Comparison(
        question=label, treatment=first, control=second, factors=answer.question.factors
    )


def _pairs(questions: Sequence[Comparison]) -> list[Comparison]:
    return list({(_arm(q.treatment), _arm(q.control)): q for q in reversed(questions)}.values())[::-1]


def _free(name: str, made: Experiment, suite: Suite) -> str:
    return name if name not in suite.arms else f"{name}_{made.training.steps}"


def _overrides(made: Experiment, suite: Suite) -> dict[str, Any] | None:
    try:
        return None if suite.axes else as_arm(made, suite.base)
    except InvalidValueError:
        return None


def _against(question: Comparison, name: str, treatment: Experiment, made: Experiment) -> Comparison:
    """Return the question against another control, with all factors in which that differs from the treatment."""
    control, differing = f"{name}@{question.control.partition('@')[2]}", _between(treatment, made)
    kept = [
        factor for factor in question.factors if factor == "precision" or any(covered(k, [factor]) for k in differing)
    ]
    more = undeclared(differing, factors_between(question.treatment, control, kept))
    factors = tuple(dict.fromkeys((*kept, *map(factor_of, more))))
    words = f"{question.question.rstrip('? ')}, at equal budget?"
    return question.model_copy(update={"question": words, "control": control, "factors": factors})


def _same_treatment(own: Experiment, control: Experiment) -> bool:
    """Return whether an arm injects, and learns from, what the control does."""
    first, second = ((arm.injection, arm.noise, arm.training.distillation) for arm in (own, control))
    return first == second


def _decays(own: Experiment) -> bool:
    return own.training.lr_scheduler in DECAYING


def _larger(first: Budget, second: Budget) -> bool:
    counts = (first.updates, second.updates), (first.answers, second.answers)
    return any(a > b and beyond(a, b) for a, b in counts)


def _between(first: Experiment, second: Experiment) -> dict[str, tuple[Any, Any]]:
    return differences(first.model_dump(mode="json"), second.model_dump(mode="json"))


def _arm(side: str) -> str:
    return side.partition("@")[0]
