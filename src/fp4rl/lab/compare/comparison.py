"""Answer questions that are shown together: objections, else the verdict over seeds, corrected as one family.

Cross-checks that take the problems as random too confirm the verdict or warn.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from fp4rl.lab import criteria
from fp4rl.lab.compare.budgets import Budgets, budgets
from fp4rl.lab.compare.fairness import Objection, objections
from fp4rl.lab.compare.sides import Side
from fp4rl.lab.criteria import Verdict, evaluate_family
from fp4rl.lab.runs import Run
from fp4rl.lab.spent import Spending
from fp4rl.lab.statistics.crossed import Bootstrapped, Scores, multi_bootstrap, two_way, varying
from fp4rl.lab.statistics.proportions import PairedFlips, mcnemar
from fp4rl.lab.statistics.seeds import Difference, Spread, pooled
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Comparison

_DRAWS_SEED = 20210630  # the bootstrap's draws are the same in every call


@dataclass(frozen=True)
class Question:
    """One question. `margin` is in points; `step` None: the last one; the specs may differ in `factors`.

    `declared`: a suite declared it before its runs, as `declaration`. Any other question is exploratory, and a margin
    that was chosen after the runs gives no verdict.
    """

    treatment: str
    control: str
    factors: tuple[str, ...] = ()
    margin: float | None = None
    step: int | None = None
    score: str = "strict"
    label: str = ""
    suite: str | None = None
    declared: bool = False
    declaration: Comparison | None = None


@dataclass(frozen=True)
class CrossChecks:
    """The cross-checks of an answer, differences in points; None for those that cannot be made."""

    two_way: Difference | None = None
    bootstrap: Bootstrapped | None = None
    checkpoints: PairedFlips | None = None  # McNemar: two single checkpoints, never two recipes
    unread: tuple[str, ...] = ()  # runs whose folder, and so their items, is not here


@dataclass(frozen=True)
class Answer:
    """The answer to a question. With `objections` it is refused: no verdict, or with `force` one without a word.

    `budgets`: what the training of both sides took; None without a verdict.
    """

    question: Question
    treatment: Side
    control: Side
    objections: tuple[Objection, ...]
    verdict: Verdict | None = None
    checks: CrossChecks = field(default_factory=CrossChecks)
    force: bool = False
    budgets: Budgets | None = None

    @property
    def comparable(self) -> bool:
        """Whether there is no objection to the comparison."""
        return not self.objections

    @property
    def refused(self) -> tuple[str, ...]:
        """The reasons why it is refused, a line each."""
        return tuple(dict.fromkeys(objection.sentence() for objection in self.objections))

    @property
    def word(self) -> str:
        """The word for a table: the verdict's word, `not comparable`, or that there is none."""
        if self.objections or self.verdict is None:
            return "not comparable"
        return self.verdict.word or "no verdict"

    @property
    def quotable(self) -> bool:
        """Whether its word stands alone: it was declared beforehand, and other training alone does not explain it."""
        earned = self.comparable and self.verdict is not None and self.verdict.word is not None
        return earned and self.question.declared and self.budgets is not None and not self.budgets.confounded

    @property
    def marks(self) -> tuple[str, ...]:
        """Remarks beside the numbers: runs that training hardly changed, and those whose preflight was skipped."""
        runs = [side_run.run for side in (self.treatment, self.control) for side_run in side.runs]
        few = ((run.key, run.result.evidence.hardly_moved) for run in runs)
        skipped = [run.key for run in runs if run.result.preflight == "skipped"]
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        return (
            *(f"{key} is hardly trained: {why}" for key, why in few if why),
            *([f"the preflight of {skipped[0]}{more} was skipped"] if skipped else []),
        )

    def sentence(self) -> str:
        """Return the answer in words."""
        if self.objections or self.verdict is None:
            return f"Not comparable: {'; '.join(self.refused)}."
        return self.verdict.in_words(self.treatment.name, self.control.name)

    def as_dict(self) -> dict[str, object]:
        """Return the answer as plain values for JSON."""
        return {
            "question": {name: value for name, value in asdict(self.question).items() if name != "declaration"},
            "treatment": _side_dict(self.treatment),
            "control": _side_dict(self.control),
            "comparable": self.comparable,
            "objections": [asdict(objection) for objection in self.objections],
            "marks": self.marks,
            "verdict": asdict(self.verdict) if self.verdict else None,
            "checks": asdict(self.checks),
            "budgets": self.budgets and asdict(self.budgets) | {"equal": self.budgets.equal},
            "quotable": self.quotable,
        }


def answer_all(
    questions: Sequence[tuple[Question, Side, Side]], spread_of: Callable[[Run], Spread | None], *, force: bool = False
) -> tuple[Answer, ...]:
    """Answer questions that are shown together, as one family; a refused one still counts in the correction.

    `spread_of`: the spread of repeats of a run's task and model, for sides of one seed; if it returns None, that of
    repeats among the sides is used. With `force` the difference of an unfair pair is shown with its interval, without
    an effect word.
    """
    answers = [_objected(*sides, force) for sides in questions]
    fair = [answer for answer in answers if answer.comparable]
    spread = _spread(answers, spread_of)
    verdicts = iter(evaluate_family(list(map(_member, fair)), spread=spread, others=len(answers) - len(fair)))
    judged = (
        replace(answer, verdict=_earned(answer, next(verdicts)) if answer.comparable else _forced(answer, spread))
        for answer in answers
    )
    spending = Spending(own.run for a in answers for side in (a.treatment, a.control) for own in side.runs)
    return tuple(_at_budget(answer, spending) for answer in judged)


def _at_budget(answer: Answer, spending: Spending) -> Answer:
    """Return the answer with what both sides took, and its verdict with what is unequal or not there yet."""
    if answer.verdict is None:
        return answer
    took = budgets(answer.treatment, answer.control, spending)
    part = " and ".join(filter(None, (answer.treatment.part, answer.control.part)))
    why = "; ".join(filter(None, (answer.verdict.why, part and f"it rests on {part}", took.sentence())))
    return replace(answer, verdict=replace(answer.verdict, why=why), budgets=took)


def checked(answer: Answer) -> Answer:
    """Return the answer with the cross-checks over problems beside its verdict."""
    return replace(answer, checks=_cross_checks(answer.treatment, answer.control)) if answer.verdict else answer


def _cross_checks(treatment: Side, control: Side) -> CrossChecks:
    """Return the cross-checks over the problems of both sides. Raises `Damaged` for a file that cannot be read."""
    runs = [side_run.run for side in (treatment, control) for side_run in side.runs]
    if unread := tuple(run.key for run in runs if run.folder is None):
        return CrossChecks(unread=unread)
    (problems, first), (others, second) = _score_table(treatment), _score_table(control)
    if not problems or problems != others:
        return CrossChecks()
    if len(first) == len(second) == 1:
        # McNemar counts solved and not solved; a share over several samples is neither.
        single = np.isin(np.concatenate([first, second]), (0.0, 1.0)).all()
        gained, lost = int((first > second).sum()), int((first < second).sum())
        return CrossChecks(checkpoints=mcnemar(gained, lost) if single else None)
    if min(len(first), len(second)) < 2:
        return CrossChecks()
    points = 100 * first, 100 * second
    if not varying(*points):
        return CrossChecks()
    return CrossChecks(two_way(*points), multi_bootstrap(*points, generator=np.random.default_rng(_DRAWS_SEED)))


def _score_table(side: Side) -> tuple[list[str], Scores]:
    """Return the ids of the problems, and the share of samples solved, [runs, problems].

    There are none where a run has no items here, or where runs differ in problems or numbers of samples.
    """
    measured = side.runs[0].measured
    answered: list[tuple[list[str], list[int]]] = []  # problems and samples of each, where they change between runs
    shares, ids = [], None
    for folder in (side_run.run.folder for side_run in side.runs):
        if folder is None or (measured.step, measured.profile.name) not in folder.item_sets():
            return [], np.empty((0, 0))
        items = folder.items(measured.step, measured.profile.name, ["problem_id", side.score])
        if ids is None or not ids.equals(items.column("problem_id")):
            ids = items.column("problem_id")
            names, row, counts = np.unique(ids.to_pylist(), return_inverse=True, return_counts=True)
            answered.append((names.tolist(), counts.tolist()))
        solved = [flag is True for flag in items.column(side.score).to_pylist()]
        shares.append(np.bincount(row, weights=solved) / counts)  # [problems]
    if any(other != answered[0] for other in answered):
        return [], np.empty((0, 0))
    return answered[0][0], np.stack(shares)


def _objected(question: Question, treatment: Side, control: Side, force: bool) -> Answer:
    first, second = (
        {(side_run.run.key, side_run.measured.step, side_run.measured.profile.name) for side_run in side.runs}
        for side in (treatment, control)
    )
    if first and first == second:
        raise InvalidValueError(f"{question.treatment} and {question.control} are the same numbers of the same runs")
    return Answer(question, treatment, control, objections(treatment, control, question.factors), force=force)


def _member(answer: Answer) -> criteria.Comparison:
    label = answer.question.label or f"{answer.treatment.name} against {answer.control.name}"
    return criteria.Comparison(label, answer.treatment.points, answer.control.points, answer.question.margin)


def _earned(answer: Answer, verdict: Verdict) -> Verdict:
    if verdict.word != "reaches" or answer.question.declared:
        return verdict
    why = f"{verdict.why}; no word: a margin counts where the suite fixed it beforehand"
    return replace(verdict, word=None, why=why)


def _forced(answer: Answer, spread: Spread | None) -> Verdict | None:
    if not (answer.force and answer.treatment.points and answer.control.points):
        return None
    why = "not comparable: an effect word would be about more than the declared factor"
    return replace(evaluate_family([_member(answer)], spread=spread)[0], word=None, why=why)


def _spread(answers: Sequence[Answer], spread_of: Callable[[Run], Spread | None]) -> Spread | None:
    """Return the run-to-run spread for the first side of one run whose task and model have known repeats."""
    pairs = [(answer.treatment, answer.control) for answer in answers if answer.treatment.runs and answer.control.runs]
    single = [treatment.runs[0].run for treatment, control in pairs if min(len(treatment.runs), len(control.runs)) == 1]
    for run in {run.experiment: run for run in single if run.spec}.values():
        if (known := spread_of(run)) is not None:
            return known
    sides = {side.name: side.points for answer in answers for side in (answer.treatment, answer.control)}
    return pooled(sides.values()) if single else None


def _side_dict(side: Side) -> dict[str, object]:
    return {
        "name": side.name,
        "suite": side.suite,
        "planned": side.planned,
        "runs": [
            {
                "run": side_run.run.key,
                "seed": side_run.run.seed,
                "step": side_run.measured.step,
                "share": side_run.measured.score(side.score),
                "gaps": side_run.run.gaps,
            }
            for side_run in side.runs
        ],
    }
