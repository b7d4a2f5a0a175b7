"""The report of a suite as one HTML file that needs no network."""

from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.files import write_whole
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.descriptions import arm_differences, measured_under, versions
from fp4rl.lab.report.evidence_rows import evidence_of
from fp4rl.lab.report.figures import accuracy, answers, learning
from fp4rl.pages import page as pages
from fp4rl.spec.errors import InvalidValueError

# Lengths of strokes and gaps of Plotly's dashes at this line width, so that the legend shows what the curves show.
_STROKES = {"solid": "", "dash": "9 5", "dot": "3 4", "dashdot": "9 4 3 4", "longdash": "14 5"}


def write_html(report: SuiteReport, path: Path) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises `NotFoundError` without the extra `report`, `InvalidValueError` where the path cannot be written.
    """
    page = render(report)
    try:
        write_whole(path, page)
    except OSError as error:
        raise InvalidValueError(f"cannot write {path}: {error.strerror}; give a folder that can be written") from None
    return path


def render(report: SuiteReport) -> str:
    """The page as text. The same report gives the same text, byte for byte.

    Raises `NotFoundError` without the extra `report`.
    """
    curves, scores, questions = learning(report), accuracy(report), answers(report.questions)
    return pages.render(
        Path(__file__).with_name("report.html.j2"),
        [figure for figure in (questions, scores, *curves) if figure is not None],
        report=report,
        arms=[_arm(number, name, report) for number, name in enumerate(report.arms)],
        unproven=sum(bool(run.gaps) for run in report.runs),
        learning=curves,
        accuracy=scores,
        answers=questions,
        has_margin=any(question.question.margin for question in report.questions),
        has_noise=any(figure.id == "sigma" for figure in curves),
        evidence=[evidence_of(report, arm) for arm in report.arms],
        differences=arm_differences(report),
        versions=versions(report),
        under=lambda profile, score: measured_under(profile, score, report.arms[score.arm]),
    )


def _arm(number: int, name: str, report: SuiteReport) -> dict[str, Any]:
    described = report.arms[name].model_dump(mode="json", exclude={"seed"})
    return {
        "name": name,
        "colour": number % pages.COLOURS,
        "dash": _STROKES[pages.DASHES[number % len(pages.DASHES)]],
        "yaml": yaml.safe_dump(described, sort_keys=False),
    }
