"""The report of a suite as one HTML file that needs no network."""

from dataclasses import replace
from pathlib import Path

import yaml

from fp4rl.lab.catalogue.reported import reported_as
from fp4rl.lab.report.checks import checks
from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.descriptions import arm_differences, measured_under, versions
from fp4rl.lab.report.evidence import ArmEvidence, evidence_of
from fp4rl.lab.report.figures import accuracy, answers, learning
from fp4rl.lab.report.headline import headline, ranking
from fp4rl.lab.report.heat import heat_maps
from fp4rl.lab.report.reproduce import commands
from fp4rl.lab.report.rollouts import MOST_STEPS
from fp4rl.pages import page as pages
from fp4rl.spec.experiment import Experiment

# Strokes and gaps of Plotly's dashes at this line width, so that the legend looks like the curves.
_STROKES = {"solid": "", "dash": "9 5", "dot": "3 4", "dashdot": "9 4 3 4", "longdash": "14 5"}
_MOST_SITES = 400  # rows of site tables
_MOST_ARMS = 12  # whose evidence and whole description are shown


def render(report: SuiteReport) -> str:
    """Return the page, the same bytes for the same report. Raises `NotFoundError` without the extra `report`."""
    curves, scores, questions = learning(report), accuracy(report), answers(report.questions)
    heat = heat_maps(report.by_arm)
    return pages.render(
        Path(__file__).with_name("report.html.j2"),
        [figure for figure in (questions, scores, *curves, heat) if figure is not None],
        report=report,
        headline=headline(report),
        reported=[reported_as(name) for name in report.described.reported] if report.described is not None else [],
        ranking=ranking(report.scores),
        arms=_arms(report),
        learning=curves,
        accuracy=scores,
        answers=questions,
        heat=heat,
        evidence=_evidence(report),
        checks=checks(report.runs, report.questions),
        rollouts=[
            {"name": f"{own.arm}, seed {own.seed}", "steps": list(own.by_step.items())} for own in report.rollouts
        ],
        browse=Path(__file__).with_name("browse.js").read_text(encoding="utf-8"),
        commands=commands(report),
        flips=report.flips,
        costs=report.costs,
        most_arms=_MOST_ARMS,
        most_steps=MOST_STEPS,
        differences=arm_differences(report.arms),
        versions=versions(report.runs),
        under=lambda profile, score: measured_under(profile, score, report.arms[score.arm]),
    )


def _evidence(report: SuiteReport) -> list[ArmEvidence]:
    """Return the evidence of the first arms, with as many rows of their site tables as a page has room for."""
    shown, room = [], _MOST_SITES
    for arm in list(report.arms)[:_MOST_ARMS]:
        own = evidence_of(report.by_arm[arm], arm)
        sites = own.sites[:room]
        room -= len(sites)
        shown.append(replace(own, sites=sites, more_sites=len(own.sites) - len(sites)))
    return shown


def _yaml(arm: Experiment) -> str:
    return yaml.safe_dump(arm.model_dump(mode="json", exclude={"seed"}), sort_keys=False)


def _arms(report: SuiteReport) -> list[dict[str, object]]:
    return [
        {
            "name": name,
            "colour": number % pages.COLOURS,
            "dash": _STROKES[pages.DASHES[number % len(pages.DASHES)]],
            "yaml": _yaml(arm) if number < _MOST_ARMS else "",
        }
        for number, (name, arm) in enumerate(report.arms.items())
    ]
