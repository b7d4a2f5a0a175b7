"""The comparison of two sides: objections first, then the verdict over seeds and its cross-checks over problems."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, select

from fp4rl.lab.compare.fairness import Objection, objections
from fp4rl.lab.compare.scores import ScoreTable, score_table
from fp4rl.lab.compare.sides import Side, read_side
from fp4rl.lab.criteria import Comparison, Verdict, evaluate_family
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.query import spread_of_repeats
from fp4rl.lab.ledger.store import Ledger
from fp4rl.lab.statistics.crossed import Bootstrapped, multi_bootstrap, two_way
from fp4rl.lab.statistics.proportions import PairedFlips, mcnemar
from fp4rl.lab.statistics.seeds import Difference, Spread
from fp4rl.spec.errors import InvalidValueError, NotFoundError

_DRAWS_SEED = 20210630  # the bootstrap's draws are the same in every call


@dataclass(frozen=True)
class Question:
    """What is asked. `margin` in points; `step` None is the last one; `factors` may differ between the specs.

    `declared`: a suite asked it before its runs. Another question is exploratory, and a margin that is named after the
    runs reaches nothing.
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


@dataclass(frozen=True)
class CrossChecks:
    """Tests that take the problems as random too, in points. They confirm or warn; the verdict is over seeds."""

    two_way: Difference | None = None
    bootstrap: Bootstrapped | None = None
    checkpoints: PairedFlips | None = None  # McNemar: two single checkpoints, never two recipes
    unread: tuple[str, ...] = ()  # runs whose folder, and with it their items, is not here


@dataclass(frozen=True)
class Compared:
    """The answer. With `objections` it is refused: no verdict, or with `force` one without a word."""

    question: Question
    treatment: Side
    control: Side
    objections: tuple[Objection, ...]
    verdict: Verdict | None
    checks: CrossChecks
    force: bool = False

    @property
    def comparable(self) -> bool:
        return not self.objections

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know beside the numbers: a run whose training changed few weights is almost its start."""
        runs = [run for side in (self.treatment, self.control) for run in side.runs]
        return tuple(f"{run.key} is hardly trained: {run.hardly_moved}" for run in runs if run.hardly_moved)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a program."""
        return {
            "question": asdict(self.question),
            "treatment": _side_dict(self.treatment),
            "control": _side_dict(self.control),
            "comparable": self.comparable,
            "objections": [asdict(objection) for objection in self.objections],
            "marks": self.marks,
            "verdict": self.verdict.as_dict() if self.verdict else None,
            "checks": asdict(self.checks),
        }


def compare_all(
    ledger: Ledger, questions: Sequence[Question], *, force: bool = False, others: int = 0
) -> tuple[Compared, ...]:
    """Answer questions that are shown together, as one family. One that is refused still counts among them, and so do
    `others` that cannot be answered.

    With `force` the difference of an unfair pair is shown with its interval, without an effect word.
    """
    with ledger.reading() as connection:
        found = [_looked_up(connection, question, force) for question in questions]
        family = [_family_member(one) for one in found if one.comparable]
        spreads = [_spread(connection, one) for one in found]
        spread = spreads[0] if len(found) == 1 else next((one for one in spreads if one), None)
        judged = iter(evaluate_family(family, spread=spread, others=others + len(found) - len(family)))
        return tuple(
            _checked(
                ledger.root,
                replace(one, verdict=_said(one, next(judged)) if one.comparable else _shown_anyway(one, spread)),
            )
            for one in found
        )


def compare_among(
    ledger: Ledger, family: Sequence[Question], asked: Question, *, force: bool = False
) -> tuple[Compared, ...]:
    """Answer one question of a `family` with the verdict that it has among them; those without runs count in full."""
    with ledger.reading() as connection:
        there = [question for question in family if question == asked or _has_runs(connection, question)]
    answers = compare_all(ledger, there, force=force, others=len(family) - len(there))
    return (answers[there.index(asked)],)


def _has_runs(connection: Connection, question: Question) -> bool:
    try:
        _looked_up(connection, question, force=False)
    except NotFoundError:
        return False
    return True


def _looked_up(connection: Connection, question: Question, force: bool) -> Compared:
    sides = [
        read_side(connection, text, step=question.step, score=question.score, suite=question.suite)
        for text in (question.treatment, question.control)
    ]
    if {run.id for run in sides[0].runs} == {run.id for run in sides[1].runs} and _same_place(sides):
        raise InvalidValueError(f"{question.treatment} and {question.control} are the same numbers of the same runs")
    against = objections(sides[0], sides[1], question.factors)
    return Compared(question, sides[0], sides[1], against, None, CrossChecks(), force)


def _same_place(sides: list[Side]) -> bool:
    first, second = (side.runs[0].measured for side in sides)
    return (first.step, first.profile) == (second.step, second.profile)


def _family_member(one: Compared) -> Comparison:
    label = one.question.label or f"{one.treatment.name} against {one.control.name}"
    return Comparison(label, one.treatment.points, one.control.points, one.question.margin)


def _said(one: Compared, verdict: Verdict) -> Verdict:
    if verdict.word != "reaches" or one.question.declared:
        return verdict
    return replace(
        verdict, word=None, why=f"{verdict.why}; no word: a margin counts where the suite fixed it beforehand"
    )


def _shown_anyway(one: Compared, spread: Spread | None) -> Verdict | None:
    if not (one.force and one.treatment.points and one.control.points):
        return None
    verdict = evaluate_family([_family_member(one)], spread=spread)[0]
    return replace(
        verdict, word=None, why="not comparable: an effect word would be about more than the declared factor"
    )


def _checked(root: Path, one: Compared) -> Compared:
    """The cross-checks, where both sides have the items of the same problems."""
    if one.verdict is None:
        return one
    runs = [run.key for side in (one.treatment, one.control) for run in side.runs]
    if unread := tuple(key for key in runs if not (root / key).is_dir()):
        return replace(one, checks=CrossChecks(unread=unread))
    first, second = (_scores(root, side, one.question.score) for side in (one.treatment, one.control))
    if first is None or second is None or first.problems != second.problems:
        return one
    if len(first.scores) == len(second.scores) == 1:
        return replace(one, checks=CrossChecks(checkpoints=_flips(first, second)))
    if min(len(first.scores), len(second.scores)) < 2:
        return one
    generator = np.random.default_rng(_DRAWS_SEED)
    drawn = multi_bootstrap(100 * first.scores, 100 * second.scores, generator=generator)
    return replace(one, checks=CrossChecks(two_way(100 * first.scores, 100 * second.scores), drawn))


def _scores(root: Path, side: Side, score: str) -> ScoreTable | None:
    measured = side.runs[0].measured
    return score_table([RunFolder(root / run.key) for run in side.runs], measured.step, measured.profile, score)


def _flips(first: ScoreTable, second: ScoreTable) -> PairedFlips | None:
    """McNemar counts solved and not solved; a share over several samples is neither."""
    if not all(np.isin(table.scores, (0.0, 1.0)).all() for table in (first, second)):
        return None
    change = first.scores - second.scores
    return mcnemar(int((change > 0).sum()), int((change < 0).sum()))


def _spread(connection: Connection, one: Compared) -> Spread | None:
    """How far repeats of the treatment's task and model lie apart, in points; needed with one seed an arm."""
    if min(len(one.treatment.runs), len(one.control.runs)) > 1 or not one.treatment.runs[0].experiment:
        return None
    query = select(tables.runs.c.task, tables.runs.c.model).where(tables.runs.c.id == one.treatment.runs[0].id)
    task, model = connection.execute(query).one()
    return spread_of_repeats(connection, task, model)


def _side_dict(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "suite": side.suite,
        "runs": [
            {"run": run.key, "seed": run.seed, "step": run.measured.step, "share": run.measured.value, "gaps": run.gaps}
            for run in side.runs
        ],
    }
