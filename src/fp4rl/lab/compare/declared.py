"""The questions that a suite fixed before its runs: sides, factors, and the margin of non-inferiority."""

from pathlib import Path

from fp4rl.lab.compare.comparison import Question
from fp4rl.spec.door import parse, read_yaml
from fp4rl.spec.experiment import Comparison
from fp4rl.spec.mistakes import NotThere


def declared_questions(root: Path, suite: str) -> tuple[Question, ...]:
    """All comparisons of `root/<suite>/suite.yaml`, in order; none where the suite declares none.

    Raises `NotThere` for a suite without that file.
    """
    file = root / suite / "suite.yaml"
    if not file.is_file():
        raise NotThere(f"{file}: no such file, so nothing says which comparisons {suite} was made for; name two sides")
    declared = read_yaml(file).get("comparisons") or ()
    return tuple(_question(parse(Comparison, content, str(file)), suite) for content in declared)


def declared_question(root: Path, treatment: str, control: str) -> Question | None:
    """The one declared comparison of these two sides; None where no suite, or more than one, declares it.

    A side is `arm` or `arm@profile`, with `suite/` before it to look in that suite alone.
    """
    suites = [side.partition("/")[0] for side in (treatment, control) if "/" in side]
    suites = suites[:1] or sorted(file.parent.name for file in root.glob("*/suite.yaml"))
    asked = [side.rpartition("/")[2] for side in (treatment, control)]
    found = [
        question
        for suite in suites
        if (root / suite / "suite.yaml").is_file()
        for question in declared_questions(root, suite)
        if all(map(_names, asked, (question.treatment, question.control)))
    ]
    return found[0] if len(found) == 1 else None


def _names(asked: str, declared: str) -> bool:
    return asked in (declared, declared.partition("@")[0])


def factors_of(comparison: Comparison) -> tuple[str, ...]:
    """The keys in which the sides of a declared comparison may differ; any other difference refuses it.

    `evaluation.profiles` is always among them: which profiles an arm is judged under changes no number. `precision` is
    where the question is about it.
    """
    asked = ("precision",) if _asks_about_precision(comparison) else ()
    return (*comparison.factors, "evaluation.profiles", *asked)


def _question(comparison: Comparison, suite: str) -> Question:
    return Question(
        treatment=comparison.treatment,
        control=comparison.control,
        factors=factors_of(comparison),
        margin=None if comparison.margin is None else 100 * comparison.margin,
        label=comparison.question,
        suite=suite,
        declared=True,
    )


def _asks_about_precision(comparison: Comparison) -> bool:
    """`full` on one side: 4 bits against BF16. `deployment` on both, with another injection: each as it is served."""
    profiles = [side.partition("@")[2] for side in (comparison.treatment, comparison.control)]
    if profiles == ["deployment", "deployment"]:
        return any(factor.partition(".")[0] == "injection" for factor in comparison.factors)
    return "full" in profiles and len(set(profiles)) > 1
