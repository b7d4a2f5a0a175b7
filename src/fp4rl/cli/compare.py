"""`fp4rl compare`: two arms held against each other, or every comparison that a suite declared."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json, styled
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.questions import check_factors
from fp4rl.spec.task import SCORES
from fp4rl.spec.words import agreeing, counted

if TYPE_CHECKING:
    from fp4rl.lab.compare.comparison import Compared, Question
    from fp4rl.lab.compare.sides import Side

Margin = Annotated[
    float | None,
    typer.Option(help="Points that the treatment may be worse; a word needs a margin that the suite fixed before."),
]


def command(
    treatment: Annotated[str, typer.Argument(help="arm, suite/arm or run, each with @profile; or a suite alone.")],
    control: Annotated[str | None, typer.Argument(help="What it is held against.")] = None,
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    factor: Annotated[
        list[str] | None, typer.Option(help="Key in which the specs may differ; `precision` for the evaluation's.")
    ] = None,
    margin: Margin = None,
    step: Annotated[int | None, typer.Option(help="Step of the evaluation; the last one where none is named.")] = None,
    score: Annotated[str, typer.Option(help="strict, flexible, or another score of the answers.")] = "strict",
    force: Annotated[bool, typer.Option("--force", help="Show an unfair pair, labelled 'not comparable'.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two arms over their seeds; an unfair pair is refused with the difference.

    Examples: `fp4rl compare w4a4@deployment bf16@w4a4 --factor injection`, `fp4rl compare quickstart`
    """
    from fp4rl.lab.compare.comparison import compare_all, compare_among

    check_factors(factor or (), "--factor")
    if score not in SCORES:
        raise InvalidValueError(f"--score is one of {', '.join(SCORES)}; got {score!r}")
    with opened(runs, ledger) as found:
        asked, family = _questions(treatment, control, runs, factor, margin)
        family = tuple(replace(question, step=step, score=score) for question in family)
        if asked is None:
            answers = compare_all(found, family, force=force)
        else:
            answers = compare_among(found, family, replace(asked, step=step, score=score), force=force)
    if as_json:
        print_json([answer.as_dict() for answer in answers])
    else:
        for answer in answers:
            _print(answer)
    refused = sum(not answer.comparable for answer in answers)
    if refused and not force:
        count = (
            f"{refused} of {len(answers)} comparisons {agreeing(refused, 'is', 'are')}"
            if len(answers) > 1
            else "this pair is"
        )
        raise CheckFailed(f"{count} not comparable; --force shows the numbers, labelled so")


def _questions(
    treatment: str, control: str | None, runs: Path, factor: list[str] | None, margin: float | None
) -> "tuple[Question | None, tuple[Question, ...]]":
    """(the question, or None for all; the family it stands in). What was declared stands, among the questions of its
    suite; another `--factor` or `--margin` asks another one, alone."""
    from fp4rl.lab.compare.comparison import Question
    from fp4rl.lab.compare.declared import declared_question, declared_questions, factors_between

    if control is None:
        declared = declared_questions(runs, treatment)
        if not declared:
            raise InvalidValueError(f"the suite {treatment} declares no comparisons; name two sides")
        return None, declared
    known = declared_question(runs, treatment, control, tuple(factor or ()), margin)
    if known is not None:
        return known, declared_questions(runs, str(known.suite))
    factors = factors_between(treatment, control, factor) if factor else ()
    alone = Question(treatment, control, factors, margin)
    return alone, (alone,)


def _print(answer: "Compared") -> None:
    from rich.padding import Padding

    screen = console()

    def indented(*parts: str | tuple[str, str]) -> None:
        screen.print(Padding(styled(*parts), (0, 0, 0, 2), expand=False))  # a long line wraps below itself

    label = answer.question.label or f"{answer.treatment.name} against {answer.control.name}"
    screen.print(styled((label, "bold")), highlight=False)
    for side in (answer.treatment, answer.control):
        indented(f"{side.name}: {_side(side, with_table=_one_label(answer))}")
    for objection in answer.objections[:_MOST]:
        indented(("not comparable", "red"), f": {objection.sentence()}")
    if len(answer.objections) > _MOST:
        indented(f"and {counted(len(answer.objections) - _MOST, 'more difference')} (--json lists all)")
    for mark in answer.marks[:_MOST]:
        indented(("warning", "yellow"), f": {mark}")
    if answer.verdict is None:
        return
    indented(answer.verdict.sentence())
    indented(answer.verdict.why)
    if not answer.question.declared:
        indented("exploratory: no suite declared this question before its runs, so it stands alone")
    checks = answer.checks
    if checks.two_way and checks.bootstrap:
        two, many = checks.two_way, checks.bootstrap
        indented(f"over seeds and problems: t [{two.low:+.1f}, {two.high:+.1f}], p = {two.p:.2g}")
        line = f"Multi-Bootstrap [{many.low:+.1f}, {many.high:+.1f}], p = {many.p:.2g} (cross-checks, no verdict)"
        indented(line)
    if checks.unread:
        runs = counted(len(checks.unread), "run")
        screen.print(f"no cross-checks over problems: the folders of {runs} are not here", highlight=False)
    if checks.checkpoints:
        flips = checks.checkpoints
        line = (
            f"McNemar of these two checkpoints, not of their recipes: +{flips.gained} -{counted(flips.lost, 'problem')}"
        )
        indented(f"{line}, p = {flips.p:.2g}")


_MOST = 12


def _one_label(answer: "Compared") -> bool:
    """Whether both sides go by one label, though other sites were rounded or the same ones otherwise."""
    labels, tables = (
        {run.measured.conditions.get(key) for side in (answer.treatment, answer.control) for run in side.runs}
        for key in ("precision", "sites_digest")
    )
    return len(labels) == 1 < len(tables)


def _side(side: "Side", *, with_table: bool) -> str:
    """`seeds 0 1 2: 71.2 70.5 72.0 % at step 30 (w4a4)`, with the digest of the site table where that tells."""
    measured = side.runs[0].measured
    shown = side.runs[:_MOST]
    seeds = " ".join("?" if run.seed is None else str(run.seed) for run in shown)
    values = " ".join(f"{100 * run.measured.value:.1f}" for run in shown)
    more = f" and {len(side.runs) - _MOST} more" if len(side.runs) > _MOST else ""
    precision = measured.conditions.get("precision") or "precision not known"
    if with_table:
        precision += f", site table {measured.conditions.get('sites_digest') or 'none'}"
    word = "seeds" if len(side.runs) > 1 else "seed"
    return f"{word} {seeds}: {values}{more} % at step {measured.step} ({measured.profile}: {precision})"
