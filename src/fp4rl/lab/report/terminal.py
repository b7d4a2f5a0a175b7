"""The report in the terminal: accuracy of every arm, then the answer to each question."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.scores import Mean, Score
from fp4rl.lab.tables import WholeWords
from fp4rl.spec.evaluation import MATMUL_NOISE

_STYLE = {"better": "bold green", "reaches": "bold green", "worse": "bold red", "not comparable": "bold yellow"}
_WIDE = 104
_ONLY_WIDE = ("step 0", "flexible", "format", "p (Holm)")  # columns that a narrow terminal leaves out
_RIGHT: dict[str, Any] = {"justify": "right"}
_WHOLE: dict[str, Any] = {"no_wrap": True}
_FOLD: dict[str, Any] = {"overflow": "fold"}


def terminal(report: SuiteReport, width: int) -> RenderableType:
    """Return tables that fit into 80 columns, and show more from 104 on."""
    wide = width >= _WIDE
    head = Text.assemble((report.name, "bold"), f"  {report.state}, code {report.code_digest}")
    parts: list[RenderableType] = [head, Text(), _accuracy(report, wide), Text()]
    if report.questions:
        sentences = [_hanging(f"{number}.", answer.sentence()) for number, answer in enumerate(report.questions, 1)]
        parts += [_questions(report.questions, wide), Text(), *sentences, Text()]
    return Group(*parts, *(_hanging("-", note, "dim") for note in report.notes))


def _table(
    title: str, columns: Mapping[str, Mapping[str, Any]], rows: Iterable[Mapping[str, str | Text]], wide: bool
) -> Table:
    table = WholeWords(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold")
    shown = [name for name in columns if wide or name not in _ONLY_WIDE]
    for name in shown:
        table.add_column(name, **columns[name])
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in map(row.__getitem__, shown)))
    return table


def _accuracy(report: SuiteReport, wide: bool) -> Table:
    columns = {
        "arm": _FOLD,
        "seeds": _RIGHT,
        "step 0": _RIGHT,
        "in full precision": _WHOLE,
        "as deployed": _WHOLE,
        "flexible": _RIGHT,
        "format": _RIGHT,
    }
    return _table("Accuracy at the last step, % [95 % over seeds]", columns, _accuracy_rows(report), wide)


def _accuracy_rows(report: SuiteReport) -> Iterator[dict[str, str | Text]]:
    """Yield a row for each arm, and one for each profile besides `full` and `deployment` (quantized afterwards)."""
    for arm in report.arms:
        own = {score.profile: score for score in report.scores if score.arm == arm}
        full, deployed = own.pop("full", None), own.pop("deployment", None)
        shown = deployed or full
        if shown is not None:
            profiles = deployed.profiles if deployed is not None else ()
            nothing = profiles and all(profile.precision and not profile.sites_digest for profile in profiles)
            yield _accuracy_row(arm, shown, _cell(full), "-" if nothing else _cell(deployed))
        for profile, score in own.items():
            how = "under" if profile.startswith(MATMUL_NOISE) else "then"
            yield _accuracy_row(f"  {arm}, {how} {profile}", score, "", _cell(score))


def _accuracy_row(name: str, score: Score, full: str, deployed: str) -> dict[str, str | Text]:
    counted, finished = len(score.values), len(score.by_seed)
    return {
        "arm": name,
        "seeds": str(counted) if counted == finished else f"{counted} of {finished}",
        "step 0": _number(score.before),
        "in full precision": full,
        "as deployed": deployed,
        "flexible": _number(score.flexible),
        "format": _number(score.formatted),
    }


def _questions(questions: Iterable[Answer], wide: bool) -> Table:
    columns = {
        "": _RIGHT,
        "question": _FOLD | {"ratio": 1},
        "difference": _WHOLE,
        "seeds": _RIGHT | _WHOLE,
        "p (Holm)": _RIGHT | _WHOLE,
        "verdict": _FOLD | {"max_width": 19 if wide else 14},
    }
    rows = [_question_row(number, answer) for number, answer in enumerate(questions, 1)]
    return _table("Questions, points [95 % over seeds, before correction]", columns, rows, wide)


def _question_row(number: int, answer: Answer) -> dict[str, str | Text]:
    row: dict[str, str | Text] = {"": str(number), "question": answer.question.label}
    row |= {"difference": "-", "seeds": "-", "p (Holm)": "-", "verdict": Text(answer.word, _STYLE.get(answer.word, ""))}
    verdict = answer.verdict
    if verdict is not None and answer.comparable:
        span = "" if verdict.low is None else f" [{verdict.low:+.1f}, {verdict.high:+.1f}]"
        row |= {"difference": f"{verdict.difference:+.1f}{span}", "seeds": f"{verdict.seeds[0]} vs {verdict.seeds[1]}"}
        row["p (Holm)"] = "-" if verdict.p_family is None else f"{verdict.p_family:.2g}"
    return row


def _hanging(mark: str, text: str, style: str = "") -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), Text(text, style=style))
    return grid


def _cell(score: Score | None) -> str:
    if score is None or score.after is None:
        return "not comparable" if score is not None and score.by_seed else "-"
    return _number(score.after) + (
        "" if score.after.low is None else f" [{score.after.low:.1f}, {score.after.high:.1f}]"
    )


def _number(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.1f}"
