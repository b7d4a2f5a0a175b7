"""The questions that a suite fixed before its runs: sides, factors, and the margin of non-inferiority."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fp4rl.lab.compare.comparison import Question
from fp4rl.lab.compare.differing import factors_between
from fp4rl.lab.compare.sides import At, Side, planned_side
from fp4rl.lab.suites import SuiteRuns
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.experiment import Comparison
from fp4rl.spec.load import parse, read_spec


def suite_questions(suite: SuiteRuns, at: At) -> list[tuple[Question, Side, Side]]:
    """Return every question of a suite with both sides, out of the runs that it plans."""
    questions = [question_of(comparison, suite.folder.name) for comparison in suite.comparisons]
    return with_sides(questions, lambda name: planned_side(name, suite.by_arm, at), at)


def with_sides(questions: Sequence[Question], side: Callable[[str], Side], at: At) -> list[tuple[Question, Side, Side]]:
    """Return each question, of the number that `at` says, with its sides as `side` finds them by their names."""
    return [(replace(q, step=at.step, score=at.score), side(q.treatment), side(q.control)) for q in questions]


def declared_questions(root: Path, suite: str) -> tuple[Question, ...]:
    """Return all comparisons of `root/<suite>/suite.yaml` in order. Raises `NotFoundError` for a suite without it."""
    file = root / suite / "suite.yaml"
    if not file.is_file():
        raise NotFoundError(
            f"{file}: no such file, so nothing says which comparisons {suite} was made for; name two sides"
        )
    declared = read_spec(file).get("comparisons") or ()
    return tuple(question_of(parse(Comparison, content, str(file)), suite) for content in declared)


def declared_question(
    root: Path, treatment: str, control: str, factors: Sequence[str] = (), margin: float | None = None
) -> Question | None:
    """Return the one declared comparison of these two sides; None where no suite, or more than one, declares it, or
    where `factors` or the `margin` in points are given and are not those of the suite.

    A side is `arm` or `arm@profile`, with `suite/` before it to look in that suite only.
    """
    suites = [side.partition("/")[0] for side in (treatment, control) if "/" in side]
    suites = suites[:1] or sorted(file.parent.name for file in root.glob("*/suite.yaml"))
    names = [side.rpartition("/")[2] for side in (treatment, control)]
    wanted = set(factors_between(treatment, control, factors))
    matching = [
        question
        for suite in suites
        if (root / suite / "suite.yaml").is_file()
        for question in declared_questions(root, suite)
        if names[0] in (question.treatment, question.treatment.partition("@")[0])
        and names[1] in (question.control, question.control.partition("@")[0])
        and (not factors or set(question.factors) == wanted)
        and margin in (None, question.margin)
    ]
    return matching[0] if len(matching) == 1 else None


def question_of(comparison: Comparison, suite: str) -> Question:
    """Return the question that a suite declares; its margin becomes points."""
    return Question(
        treatment=comparison.treatment,
        control=comparison.control,
        factors=factors_between(comparison.treatment, comparison.control, comparison.factors),
        margin=None if comparison.margin is None else 100 * comparison.margin,
        label=comparison.question,
        suite=suite,
        declared=True,
        declaration=comparison,
    )
