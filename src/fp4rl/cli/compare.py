"""`fp4rl compare`: compare two arms, or answer every question that a suite declared."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.budgets_view import print_budgets, print_missing
from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_indented, print_json, styled
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.former_names import in_present_words
from fp4rl.spec.load import check_factors
from fp4rl.spec.task import SCORES
from fp4rl.spec.words import agreeing, counted

if TYPE_CHECKING:
    from fp4rl.lab.compare.comparison import Answer, CrossChecks
    from fp4rl.lab.compare.controls import MissingControl
    from fp4rl.lab.compare.sides import At, Side
    from fp4rl.lab.ledger.store import Ledger

_MOST = 12  # lines of one kind, and seeds of a side, that are shown


def command(
    treatment: Annotated[str, typer.Argument(help="arm, suite/arm or run, each with @profile; or a suite alone.")],
    control: Annotated[str | None, typer.Argument(help="What it is compared with.")] = None,
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    factor: Annotated[
        list[str] | None, typer.Option(help="Key in which the specs may differ; `precision` for the evaluation's.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="Points that the treatment may be worse; a verdict needs a margin fixed before the runs."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step of the evaluation; by default the last.")] = None,
    score: Annotated[str, typer.Option(help="strict, flexible, or another score of the answers.")] = "strict",
    force: Annotated[bool, typer.Option("--force", help="Show an unfair pair, labelled 'not comparable'.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two arms over their seeds; an unfair pair is refused, and the difference named.

    Examples: `fp4rl compare w4a4@deployment bf16@w4a4 --factor injection`, `fp4rl compare quickstart`
    """
    from fp4rl.lab.compare.controls import lacking
    from fp4rl.lab.compare.sides import At

    factors = in_present_words({"factors": factor or []})["factors"]
    check_factors(factors, "--factor")
    if score not in SCORES:
        raise InvalidValueError(f"--score is one of {', '.join(SCORES)}; got {score!r}")
    with opened(runs, ledger) as book:
        answers = _answers(book, treatment, control, runs, factors, margin, At(step, score), force)
    missing = lacking(answers, runs / answers[0].treatment.suite)
    if as_json:
        print_json([answer.as_dict() | {"equal_control": _of(answer, missing)} for answer in answers])
    else:
        for answer in answers:
            _print(answer)
        print_missing(missing)
    refused = sum(not answer.comparable for answer in answers)
    if refused and not force:
        of_all = f"{refused} of {len(answers)} comparisons {agreeing(refused, 'is', 'are')}"
        which = of_all if len(answers) > 1 else "this pair is"
        raise CheckFailed(f"{which} not comparable; --force shows the numbers, labelled so")


def _answers(
    book: "Ledger",
    treatment: str,
    control: str | None,
    runs: Path,
    factors: Sequence[str],
    margin: float | None,
    at: "At",
    force: bool,
) -> "tuple[Answer, ...]":
    """Answer a suite's questions, or one of them, corrected as one family; a question that the suite did not declare
    (another `--factor` or `--margin`) is answered on its own."""
    from fp4rl.lab.compare.comparison import Question, answer_all, checked
    from fp4rl.lab.compare.declared import declared_question
    from fp4rl.lab.compare.differing import factors_between
    from fp4rl.lab.compare.recorded import named_side, questions_in
    from fp4rl.lab.ledger.query import spread_of_run

    known = declared_question(runs, treatment, control, factors, margin) if control is not None else None
    suite = treatment if control is None else (known.suite if known is not None else None)
    with book.reading() as connection:
        if suite is not None:
            questions = questions_in(connection, runs, suite, at)
            if not questions:
                raise InvalidValueError(f"the suite {suite} declares no comparisons; name two sides")
        else:
            together = factors_between(treatment, str(control), factors) if factors else ()
            question = Question(treatment, str(control), together, margin, at.step, at.score)
            sides = [named_side(connection, runs, name, at) for name in (treatment, str(control))]
            questions = [(question, sides[0], sides[1])]
        answers = answer_all(questions, lambda run: spread_of_run(connection, run), force=force)
    return tuple(checked(a) for a in answers if known is None or a.question.declaration == known.declaration)


def _of(answer: "Answer", missing: "Sequence[MissingControl]") -> dict[str, Any] | None:
    arms = [side.runs[0].run.arm for side in (answer.treatment, answer.control) if side.runs]
    return next((each.as_dict() for each in missing if [*each.arms] == arms), None)


def _print(answer: "Answer") -> None:
    label = answer.question.label or f"{answer.treatment.name} against {answer.control.name}"
    console().print(styled((label, "bold")))
    sides = (answer.treatment, answer.control)
    profiles = [run.measured.profile for side in sides for run in side.runs]
    # The same label can mean other sites, or the same sites rounded differently.
    one_label = len({p.precision for p in profiles}) == 1 < len({p.sites_digest for p in profiles})
    for side in sides:
        print_indented(f"{side.name}: {_side(side, with_table=one_label)}")
    for objection in answer.objections[:_MOST]:
        print_indented(("not comparable", "red"), f": {objection.sentence()}")
    if len(answer.objections) > _MOST:
        print_indented(f"and {counted(len(answer.objections) - _MOST, 'more difference')} (--json lists all)")
    for mark in answer.marks[:_MOST]:
        print_indented(("warning", "yellow"), f": {mark}")
    if answer.verdict is None:
        return
    print_indented(answer.verdict.sentence())
    print_indented(answer.verdict.why)
    if answer.budgets is not None:
        print_budgets(answer.budgets)
    if not answer.question.declared:
        print_indented("exploratory: no suite declared this question before its runs, so it stands alone")
    for line in _checks(answer.checks):
        print_indented(line)


def _checks(checks: "CrossChecks") -> Iterator[str]:
    """Yield lines on the test over problems, or why there is none."""
    if checks.two_way and checks.bootstrap:
        two, many = checks.two_way, checks.bootstrap
        yield f"over seeds and problems: t [{two.low:+.1f}, {two.high:+.1f}], p = {two.p:.2g}"
        yield f"Multi-Bootstrap [{many.low:+.1f}, {many.high:+.1f}], p = {many.p:.2g} (cross-checks, no verdict)"
    if checks.unread:
        yield f"no cross-checks over problems: the folders of {counted(len(checks.unread), 'run')} are not here"
    if checks.checkpoints:
        flips = checks.checkpoints
        lost = counted(flips.lost, "problem")
        yield f"McNemar of these two checkpoints, not of their recipes: +{flips.gained} -{lost}, p = {flips.p:.2g}"


def _side(side: "Side", *, with_table: bool) -> str:
    """Return `seeds 0 1 2: 71.2 70.5 72.0 % at step 30 (w4a4)`, with the site table's digest where it matters."""
    if not side.runs:
        return side.missing or "no run"
    measured = side.runs[0].measured
    seeds = " ".join("?" if side_run.run.seed is None else str(side_run.run.seed) for side_run in side.runs[:_MOST])
    values = " ".join(f"{points:.1f}" for points in side.points[:_MOST])
    more = f" and {len(side.runs) - _MOST} more" if len(side.runs) > _MOST else ""
    precision = measured.profile.precision or "precision not known"
    if with_table:
        precision += f", site table {measured.profile.sites_digest or 'none'}"
    word = "seeds" if len(side.runs) > 1 else "seed"
    return f"{word} {seeds}: {values}{more} % at step {measured.step} ({measured.profile.name}: {precision})"
