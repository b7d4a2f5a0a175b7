"""The report as one HTML file that needs no network: template, style, script and Plotly, all inside."""

from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.files import write_whole
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.descriptions import arm_differences, measured_under, versions
from fp4rl.lab.report.evidence_rows import evidence_of
from fp4rl.lab.report.figures import DASHES, accuracy, answers, learning
from fp4rl.spec.errors import InvalidValueError, NotFoundError

_HERE = Path(__file__).parent
_COLOURS = 6  # --arm-0 to --arm-5 in page.css
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
    """The page as text. The same report gives the same text, byte for byte."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise NotFoundError(f"the HTML report needs {error.name}; pip install 'fp4rl[report]'") from None
    loader = jinja2.FileSystemLoader(_HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page: str = environment.get_template("page.html.j2").render(_contents(report) | {"plotly_js": get_plotlyjs()})
    return page


def _contents(report: SuiteReport) -> dict[str, Any]:
    curves, scores, asked = learning(report), accuracy(report), answers(report.questions)
    figures = [figure.as_dict() for figure in (asked, scores, *curves) if figure is not None]
    return {
        "report": report,
        "arms": [_arm(number, name, report) for number, name in enumerate(report.arms)],
        "unproven": sum(bool(run.gaps) for run in report.runs),
        "learning": curves,
        "accuracy": scores,
        "answers": asked,
        "figures": figures,
        "has_margin": any(question.asked.margin for question in report.questions),
        "has_noise": any(figure.id == "sigma" for figure in curves),
        "evidence": [evidence_of(report, arm) for arm in report.arms],
        "differences": arm_differences(report),
        "versions": versions(report),
        "under": lambda profile, score: measured_under(profile, score, report.arms[score.arm]),
        "css": (_HERE / "page.css").read_text(encoding="utf-8"),
        "js": (_HERE / "page.js").read_text(encoding="utf-8"),
    }


def _arm(number: int, name: str, report: SuiteReport) -> dict[str, Any]:
    described = report.arms[name].model_dump(mode="json", exclude={"seed"})
    return {
        "name": name,
        "colour": number % _COLOURS,
        "dash": _STROKES[DASHES[number % len(DASHES)]],
        "yaml": yaml.safe_dump(described, sort_keys=False),
    }
