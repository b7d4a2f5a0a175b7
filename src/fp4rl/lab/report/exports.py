"""The report as Markdown, to paste into a document, and as CSV, one line for each evaluation of each run."""

import csv
from collections.abc import Iterator, Sequence
from io import StringIO

from fp4rl.lab.report.checks import checks
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.headline import headline, ranking
from fp4rl.lab.report.reproduce import commands
from fp4rl.lab.report.scores import Mean

_COLUMNS = (
    *("suite", "arm", "seed", "run_id", "status", "counts", "stale", "step", "last", "profile", "precision"),
    *("problems", "strict", "flexible", "formatted", "truncated", "mean_length", "kl", "sites_digest", "items_digest"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take for one


def markdown(report: SuiteReport) -> str:
    """Return the report's tables in Markdown; numbers in percent and points."""
    return "\n".join(_lines(report)) + "\n"


def table_csv(report: SuiteReport) -> str:
    """Return a line for each evaluation of each run, shares in 0..1; a planned run without one has a line too."""
    out = StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in _rows(report))
    return out.getvalue()


def _lines(report: SuiteReport) -> Iterator[str]:
    yield from (f"# {_cell(report.name)}: {report.state}", "", f"Code {report.code_digest}.", "")
    for sentence in headline(report):
        yield from (_cell(sentence), "")
    if report.questions:
        yield "## Questions"
        yield ""
        rows = [
            (
                answer.question.label,
                f"{answer.question.treatment} against {answer.question.control}",
                answer.word,
                answer.sentence() if answer.verdict else "; ".join(answer.refused),
            )
            for answer in report.questions
        ]
        yield from _table(("question", "sides", "word", "in words"), rows)
    yield from ("## Ranking", "")
    ranked = [
        (str(row.rank), row.score.name, _mean(row.score.after), _mean(row.cost, "+"), str(len(row.score.values)))
        for row in ranking(report.scores)
    ]
    yield from _table(("place", "arm @ profile", "accuracy, % [95 %]", "against full precision", "seeds"), ranked)
    yield from ("## Evidence", "")
    proof = [
        (own.trap, own.how, f"{own.passed} of {own.total} {own.of}", own.others or "-")
        for own in checks(report.runs, report.questions)
    ]
    yield from _table(("trap", "ruled out by", "that pass", "not passed by"), proof)
    yield from ("## Read with this", "", *(f"- {_cell(note)}" for note in report.notes), "")
    yield from ("## How to make these numbers again", "")
    yield from _table(("command", "what it does"), [(f"`{command}`", what) for command, what in commands(report)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    yield from (f"| {' | '.join(map(_cell, row))} |" for row in rows)
    yield ""


def _cell(text: str) -> str:
    """Return text that Markdown shows as it is: no markup of HTML, no end of a cell or line."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _mean(mean: Mean | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    span = "" if mean.low is None else f" [{mean.low:{sign}.1f}, {mean.high:{sign}.1f}]"
    return f"{mean.value:{sign}.1f}{span}"


def _rows(report: SuiteReport) -> Iterator[dict[str, object]]:
    for own in report.runs:
        named = {"suite": report.name, "arm": own.planned.arm, "seed": own.planned.seed, "run_id": own.planned.run_id}
        named |= {"status": own.status.word, "counts": own.counts, "stale": own.stale}
        evaluations = own.run.result.evaluations if own.run is not None else ()
        for e in evaluations:
            numbers = {name: getattr(e, name) for name in ("step", "last", "strict", "flexible", "formatted")}
            numbers |= {
                "truncated": e.truncated,
                "mean_length": e.mean_length,
                "kl": e.kl,
                "problems": e.problems or e.n,
            }
            profile = {name: getattr(e.profile, name) for name in ("precision", "sites_digest", "items_digest")}
            yield {**named, **numbers, "profile": e.profile.name, **profile}
        if not evaluations:
            yield named


def _plain(value: object) -> object:
    """Return a text so that no spreadsheet takes it for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
