"""The report in the terminal: accuracy of every arm, then what each question came to."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.scores import Mean, Score
from fp4rl.spec.evaluation import MATMUL_NOISE

_STYLE = {"better": "bold green", "reaches": "bold green", "worse": "bold red", "not comparable": "bold yellow"}
_WIDE = 104


def terminal(report: SuiteReport) -> RenderableType:
    """Tables that read at 80 columns, and show more from 104 on."""
    return _Screen(report)


@dataclass(frozen=True)
class _Screen:
    report: SuiteReport

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        report, wide = self.report, options.max_width >= _WIDE
        yield Text.assemble((report.name, "bold"), f"  {report.state}, code {report.code_digest}")
        yield Text()
        yield _accuracy(report, wide)
        yield Text()
        if report.questions:
            yield _questions(report.questions, wide)
            yield Text()
            for number, question in enumerate(report.questions, 1):
                yield _hanging(f"{number}.", question.sentence())
            yield Text()
        for note in report.notes:
            yield _hanging("-", note, "dim")


def _accuracy(report: SuiteReport, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Accuracy at the last step, % [95 % over seeds]")
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("arm", overflow="fold")
    table.add_column("seeds", justify="right")
    if wide:
        table.add_column("step 0", justify="right")
    for name in ("in full precision", "as deployed"):
        table.add_column(name, no_wrap=True)
    if wide:
        table.add_column("flexible", justify="right")
        table.add_column("format", justify="right")
    for row in _rows(report):
        table.add_row(*(Text(cell) for cell, always in row if always or wide))
    return table


def _rows(report: SuiteReport) -> Iterator[list[tuple[str, bool]]]:
    """One row an arm; a profile that is neither `full` nor `deployment` is what quantizing afterwards gives."""
    for arm in report.arms:
        own = {score.profile: score for score in report.scores if score.arm == arm}
        full, deployed = own.get("full"), own.get("deployment")
        shown = deployed or full
        if shown is not None:
            nothing = deployed is not None and deployed.rounds_nothing
            yield _row(arm, shown, _cell(full), "-" if nothing else _cell(deployed))
        for profile, score in own.items():
            if profile not in ("full", "deployment"):
                how = "under" if profile.startswith(MATMUL_NOISE) else "then"
                yield _row(f"  {arm}, {how} {profile}", score, "", _cell(score))


def _row(name: str, score: Score, full: str, deployed: str) -> list[tuple[str, bool]]:
    return [
        (name, True),
        (_seeds(score), True),
        (_number(score.before), False),
        (full, True),
        (deployed, True),
        (_number(score.flexible), False),
        (_number(score.formatted), False),
    ]


def _questions(questions: tuple[Answer, ...], wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Questions, points [95 % over seeds, before correction]")
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("", justify="right")
    table.add_column("question", overflow="fold", ratio=1)
    table.add_column("difference", no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    if wide:
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", max_width=19 if wide else 14)
    for number, question in enumerate(questions, 1):
        verdict = question.verdict
        cells = [str(number), question.question.label, "-", "-"]
        p = "-"
        if verdict is not None and question.comparable:
            span = "" if verdict.low is None else f" [{verdict.low:+.1f}, {verdict.high:+.1f}]"
            cells[2:] = [f"{verdict.difference:+.1f}{span}", f"{verdict.seeds[0]} vs {verdict.seeds[1]}"]
            p = "-" if verdict.p_family is None else f"{verdict.p_family:.2g}"
        word = Text(question.word, style=_STYLE.get(question.word, ""))
        table.add_row(*map(Text, cells), *([Text(p)] if wide else []), word)
    return table


def _hanging(mark: str, text: str, style: str = "") -> RenderableType:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), Text(text, style=style))
    return Padding(grid, (0, 0, 0, 0))


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    mean = score.after
    if mean is None:
        return "not comparable" if score.by_seed else "-"
    return f"{mean.value:.1f}" + ("" if mean.low is None else f" [{mean.low:.1f}, {mean.high:.1f}]")


def _seeds(score: Score) -> str:
    """How many seeds stand behind the mean, out of those that are finished."""
    counted = len(score.values)
    return str(counted) if counted == len(score.by_seed) else f"{counted} of {len(score.by_seed)}"


def _number(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.1f}"
