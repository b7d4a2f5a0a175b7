"""A scan as one self-contained HTML file: nothing is loaded from a network, it opens by double click."""

import json
from html import escape

from fp4rl.diagnose import figures
from fp4rl.diagnose.advice import Advice
from fp4rl.diagnose.findings import findings, rule_results
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.rules import COLUMNS, meanings
from fp4rl.numerics.errors import pooled
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.words import counted

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; background: #fcfbf8; margin: 0 auto; max-width: 1060px;
  padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 6px; }
p.facts, caption, p.note { color: #5b6474; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #e6e2d8; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
li { margin: 4px 0; } li small { display: block; color: #5b6474; overflow-wrap: anywhere; }
.table { overflow-x: auto; } li.fault { color: #a3200d; font-weight: 600; } code { font-size: 13px; }
.figure { width: 100%; overflow-x: auto; }
@media (max-width: 640px) { body { padding: 12px; } table { font-size: 13px; } th, td { padding-right: 8px; } }
"""
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
_SCRIPT = """
for (const found of JSON.parse(document.getElementById("figures").textContent))
  Plotly.newPlot(found.id, found.data, found.layout, {responsive: true, displaylogo: false,
    modeBarButtons: [["toImage"]]});
"""


def page(report: ScanReport, advice: Advice | None = None) -> str:
    """The whole page, with the advice where there is any.

    Raises InvalidValueError when Plotly (the extra `report`) is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InvalidValueError("the HTML page needs Plotly; install fp4rl[report]") from None
    drawn = [
        ("heat", "Layers and projections", figures.heat_map(report)),
        ("harm", "What each site's error does to the output", figures.sensitivity_bars(report)),
        ("depth", "How the error of the residual stream grows", figures.depth_lines(report)),
        ("distribution", _distribution_title(report), figures.before_and_after(report)),
    ]
    shown = [(name, title, figure) for name, title, figure in drawn if figure is not None]
    data = json.dumps([{"id": name, **figure} for name, _, figure in shown], allow_nan=False).replace("</", "<\\/")
    sections = "".join(f'<h2>{escape(t)}</h2><div class="figure" id="{name}"></div>' for name, t, _ in shown)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scan of {escape(report.model)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<script>{get_plotlyjs()}</script></head><body>{_head(report)}{_findings(report)}{_advice(advice)}{_together(report)}"
        f"{sections}{_layers(report)}{_rules(report)}"
        f'<script type="application/json" id="figures">{data}</script><script>{_SCRIPT}</script></body></html>'
    )


def _head(report: ScanReport) -> str:
    facts = [report.table.injection.name, f"{counted(len(report.table.plans), 'site')}, table {report.table.digest}"]
    if report.calibration:
        given = report.calibration
        texts, tokens = counted(given["texts"], "text"), counted(given["tokens"], "token")
        facts.append(f"{texts}, {tokens}, digest {given['digest']}")
    return f'<h1>Scan of {escape(report.model)}</h1><p class="facts">{escape(" · ".join(facts))}</p>'


def _findings(report: ScanReport) -> str:
    lines = "".join(
        f'<li class="{found.kind}">{escape(found.text)}<small>{escape(found.places())}</small></li>'
        for found in findings(report)
    )
    return f"<h2>Findings</h2><ul>{lines}</ul>"


def _advice(advice: Advice | None) -> str:
    if advice is None:
        return ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in advice.reasons)
    return f"<h2>Advice: {escape(advice.strategy)}</h2><ul>{reasons}</ul>"


def _together(report: ScanReport) -> str:
    """All weights pooled, beside the ideal of the format."""
    weights = [part for part in report.parts if part.part == "weight"]
    if not report.tallies or not weights:
        return ""
    measures, ideal = pooled(list(report.tallies.values())).measures(), weights[0].ideal
    rows = [[_WORDS[name], f"{value:.4g}", f"{ideal[name]:.4g}"] for name, value in measures.items() if name in _WORDS]
    note = '<p class="note">Scale, dead zone and grid are parts of each value\'s error and add up with their signs.</p>'
    table = _table(("measure", "these weights", "ideal Gaussian data"), rows)
    return f"<h2>All weights together</h2>{note}{table}"


def _layers(report: ScanReport) -> str:
    if report.dynamics is None:
        return ""
    rows = [
        [
            str(layer.layer),
            *(f"{value:.3g}" for value in (layer.gain, layer.min_gain, layer.max_gain, layer.kurtosis)),
            f"{layer.kurtosis_jump:+.3g}",
            f"{layer.instability:.2g}",
        ]
        for layer in report.dynamics.layers
    ]
    names = ("layer", "gain", "least", "greatest", "excess kurtosis", "jump", "instability")
    return "<h2>How layers respond to small noise</h2>" + _table(names, rows)


def _rules(report: ScanReport) -> str:
    results = rule_results(report)
    rows = [list(result.cells()) for result in results]
    if not rows:
        return ""
    said = "A rule that ideal data already breaks cannot tell one layer from another."
    note = f'<p class="note">{said} {escape(meanings(results))}</p>'
    return f"<h2>Thresholds of earlier documents</h2>{note}" + _table(COLUMNS, rows, numbers=False)


def _table(names: tuple[str, ...], rows: list[list[str]], *, numbers: bool = True) -> str:
    head = "".join(f'<th class="{_side(i, numbers)}">{escape(name)}</th>' for i, name in enumerate(names))
    body = "".join(
        "<tr>" + "".join(f'<td class="{_side(i, numbers)}">{escape(cell)}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _side(column: int, numbers: bool) -> str:
    return "number" if column and numbers else ""


def _distribution_title(report: ScanReport) -> str:
    site = report.distribution.site if report.distribution else ""
    return f"Before and after rounding: {site}"
