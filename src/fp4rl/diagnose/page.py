"""A scan as one self-contained HTML file."""

from pathlib import Path

from fp4rl.diagnose.advice import Advice
from fp4rl.diagnose.figures import figures_of
from fp4rl.diagnose.findings import findings, rule_results
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.rules import COLUMNS, meanings
from fp4rl.numerics.errors import pooled
from fp4rl.pages.page import render
from fp4rl.spec.words import counted

_WORDS = {
    "sqnr_db": "signal to error, dB",
    "relative_l2": "relative error, root of the squared sums",
    "relative_l1": "sum|e| / sum|w|",
    "mean_relative": "mean of |e| / |w|",
    "deadzone_share": "values that became zero, share",
    "clipped_share": "values beyond their scale, share",
    "clipped_error": "of the squared error, the part of those",
    "scale_bias": "relative error of the scale's own format",
    "deadzone": "relative error of values that an ideal scale rounds to zero",
    "grid_noise": "relative error of the grid",
}


def page(report: ScanReport, advice: Advice | None = None) -> str:
    """The whole page, with the advice where there is any.

    Raises `NotFoundError` when Plotly or Jinja (the extra `report`) is not installed.
    """
    drawn, results = figures_of(report), rule_results(report)
    return render(
        Path(__file__).with_name("scan.html.j2"),
        drawn,
        report=report,
        facts=_facts(report),
        findings=findings(report),
        advice=advice,
        weights=_weights(report),
        drawn=drawn,
        layers=_layers(report),
        rules=[result.cells() for result in results],
        columns=COLUMNS,
        meanings=meanings(results),
    )


def _facts(report: ScanReport) -> list[str]:
    facts = [report.table.injection.name, f"{counted(len(report.table.plans), 'site')}, table {report.table.digest}"]
    if report.calibration:
        given = report.calibration
        texts, tokens = counted(given["texts"], "text"), counted(given["tokens"], "token")
        facts.append(f"{texts}, {tokens}, digest {given['digest']}")
    return facts


def _weights(report: ScanReport) -> list[list[str]]:
    """All weights pooled, beside the ideal of the format."""
    weights = [part for part in report.parts if part.part == "weight"]
    if not report.tallies or not weights:
        return []
    measures, ideal = pooled(list(report.tallies.values())).measures(), weights[0].ideal
    return [[_WORDS[name], f"{value:.4g}", f"{ideal[name]:.4g}"] for name, value in measures.items() if name in _WORDS]


def _layers(report: ScanReport) -> list[list[str]]:
    return [
        [
            str(layer.layer),
            *(f"{value:.3g}" for value in (layer.gain, layer.min_gain, layer.max_gain, layer.kurtosis)),
            f"{layer.kurtosis_jump:+.3g}",
            f"{layer.instability:.2g}",
        ]
        for layer in (report.dynamics.layers if report.dynamics else ())
    ]
