"""A scan as one self-contained HTML file, with its figures."""

from collections.abc import Callable, Iterator
from pathlib import Path

from fp4rl.diagnose.advice import Advice
from fp4rl.diagnose.findings import COLUMNS, findings, meanings, rule_results
from fp4rl.diagnose.precision import PartError
from fp4rl.diagnose.report import EXPERT_COLUMNS, ScanReport
from fp4rl.numerics.errors import pooled
from fp4rl.pages.page import HEAT, Figure, in_rows, line, marks, over_steps, render, with_legend
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
    """Return the whole page; NotFoundError when Plotly or Jinja (the extra `report`) is not installed."""
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
        experts=report.expert_rows(MOST_BARS),
        expert_columns=EXPERT_COLUMNS,
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
    """Return rows of the measures of all weights together, beside the format's ideal."""
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


Grid = list[list[float | None]]

_ROW = 22  # pixels of one bar
MOST_BARS = 40

# Label, part, measure, whether more is worse
_MEASURES: tuple[tuple[str, str, str, bool], ...] = (
    ("weights: error over ideal", "weight", "excess", True),
    ("weights: SQNR, dB", "weight", "sqnr_db", False),
    ("weights: sum|e| / sum|w|", "weight", "relative_l1", True),
    ("weights: dead zone, share", "weight", "deadzone_share", True),
    ("weights: clipped, share", "weight", "clipped_share", True),
    ("weights: error of the scale's own format", "weight", "scale_bias", True),
    ("weights: error of the dead zone", "weight", "deadzone", True),
    ("weights: error of the grid", "weight", "grid_noise", True),
    ("inputs: error over ideal", "input", "excess", True),
    ("inputs: SQNR, dB", "input", "sqnr_db", False),
    ("inputs: median token's error", "input", "row_median", True),
)


def figures_of(report: ScanReport) -> list[Figure]:
    """Return every figure for which the scan has measurements."""
    return [*heat_map(report), *sensitivity_bars(report), *depth_lines(report), *before_and_after(report)]


def heat_map(report: ScanReport) -> Iterator[Figure]:
    """Yield a heat map of layers x projections with a menu of measures, KL first where it was measured."""
    layers = sorted({plan.site.layer for plan in report.table.plans if plan.site.layer is not None})
    roles = list(dict.fromkeys(plan.site.role for plan in report.table.plans if plan.site.layer is not None))
    named = [(label, _grid(values, layers, roles), worse) for label, values, worse in _by_layer(report)]
    grids = [(label, grid, worse) for label, grid, worse in named if any(v is not None for row in grid for v in row)]
    if not grids:
        return
    traces = [
        {
            "type": "heatmap",
            "z": grid,
            "x": roles,
            "y": [f"layer {layer}" for layer in layers],
            "colorscale": HEAT,
            "reversescale": not worse,
            "visible": number == 0,
            "hovertemplate": "%{y}, %{x}: %{z:.4g}<extra>" + label + "</extra>",
            "xgap": 2,
            "ygap": 2,
        }
        for number, (label, grid, worse) in enumerate(grids)
    ]
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": [n == m for m in range(len(grids))]}]}
        for n, (label, _, _) in enumerate(grids)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 12}}
    layout = {
        "height": 150 + 26 * len(layers),
        "updatemenus": [menu],
        "yaxis": {"autorange": "reversed"},
        "margin": {"l": 80, "r": 20, "t": 70, "b": 40},
    }
    words = f"{len(layers)} layers by {len(roles)} projections: {', '.join(label for label, _, _ in grids)}"
    yield Figure("heat", "Layers and projections", words, traces, layout)


def sensitivity_bars(report: ScanReport) -> Iterator[Figure]:
    """Yield bars of the sites with the largest KL: as measured, and as estimated by a backward pass."""
    if report.sensitivity is None or not report.sensitivity.sites:
        return
    ranked = sorted(report.sensitivity.sites, key=lambda site: site.kl, reverse=True)[:MOST_BARS]
    names = [site.name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "") for site in ranked]
    measured, hover = ranked[0].leave_one_in is not None, {"hovertemplate": "%{x:.4g}"}
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "measured" if measured else "estimated",
        "x": [site.kl for site in ranked],
        "y": names,
        "marker": {},
        "meta": {"arm": 0, "part": "bar"},
    }
    data = [bars | hover]
    if measured:
        tick = {"symbol": "line-ns-open", "size": 12, "line": {"width": 2}}
        estimates = [site.estimate for site in ranked]
        data.append(marks(estimates, names, "dots", 1, name="estimate of one backward pass", marker=tick, **hover))
    if ranked[0].leave_one_out is not None:
        saved = [site.leave_one_out.kl if site.leave_one_out is not None else None for site in ranked]
        ring = {"symbol": "circle-open", "size": 8}
        data.append(marks(saved, names, "dots", None, name="saved when it alone is left out", marker=ring, **hover))
    title = f"KL, nats per token{'' if measured else ' (estimated)'}"
    words = f"{title}: " + "; ".join(f"{site.name} {site.kl:.3g}" for site in ranked[:5])
    layout = with_legend(in_rows(names, title, _ROW))
    layout["xaxis"] |= {"rangemode": "tozero"}
    yield Figure("kl", "What each site's error does to the output", words, data, layout)


def depth_lines(report: ScanReport) -> Iterator[Figure]:
    """Yield lines of the residual stream's error after each layer: weights, inputs, both, and both if independent."""
    if not report.depth:
        return
    layers = [depth.layer for depth in report.depth]
    lines = (
        ("weights alone", 0, [d.weights for d in report.depth], {"width": 2}),
        ("inputs alone", 2, [d.inputs for d in report.depth], {"width": 2}),
        ("both", 1, [d.both for d in report.depth], {"width": 3}),
        ("if independent", None, [d.predicted for d in report.depth], {"width": 2, "dash": "dot"}),
    )
    data = [
        line(layers, y, name, arm, mode="lines+markers", line=pen, hovertemplate="%{y:.2%}")
        for name, arm, y, pen in lines
        if any(y)
    ]
    layout = with_legend(over_steps("after layer", 320))
    layout["xaxis"] |= {"dtick": max(1, len(layers) // 14), "rangemode": "normal"}
    layout["yaxis"] = {"title": {"text": "error / stream"}, "tickformat": ".0%", "rangemode": "tozero"}
    words = f"Error of the residual stream after the last layer: {report.depth[-1].both:.2%}"
    yield Figure("depth", "How the error of the residual stream grows", words, data, layout | {"margin": _WIDE})


def before_and_after(report: ScanReport) -> Iterator[Figure]:
    """Yield a logarithmic histogram of one weight before and after rounding; the last bins hold all beyond four rms."""
    distribution = report.distribution
    if distribution is None:
        return
    centres = [(a + b) / 2 for a, b in zip(distribution.edges, distribution.edges[1:], strict=False)]
    data = [
        line(centres, distribution.after, "after", 1, line={"shape": "hvh", "width": 1}, fill="tozeroy"),
        line(centres, distribution.before, "before", None, line={"shape": "hvh", "width": 2}),
    ]
    layout = with_legend(over_steps("value / root mean square", 300))
    layout["xaxis"] |= {"rangemode": "normal", "zeroline": False}
    layout["yaxis"] = {"title": {"text": "values"}, "type": "log", "dtick": 1}
    title = f"Before and after rounding: {distribution.site}"
    yield Figure("distribution", title, "Histogram of one weight", data, layout | {"margin": _WIDE})


_WIDE = {"l": 70, "r": 20, "t": 34, "b": 50}  # pixels, with room for the axis's name


def _by_layer(report: ScanReport) -> list[tuple[str, dict[tuple[int | None, str], float], bool]]:
    """Return (label, (layer, role) -> value, whether more is worse) for every measure; averages over equal keys."""
    grids = []
    if report.sensitivity is not None:
        effects = [(site.layer, site.role, site.kl) for site in report.sensitivity.sites]
        grids.append(("KL of the site alone, nats per token", _averaged(effects), True))
    for label, part, measure, worse in _MEASURES:
        read = _reader(measure)
        values = [(p.layer, p.role, v) for p in report.parts if p.part == part and (v := read(p)) is not None]
        grids.append((label, _averaged(values), worse))
    return grids


def _reader(measure: str) -> Callable[[PartError], float | None]:
    return (lambda part: part.excess) if measure == "excess" else (lambda part: part.measures.get(measure))


def _averaged(values: list[tuple[int | None, str, float]]) -> dict[tuple[int | None, str], float]:
    sums: dict[tuple[int | None, str], list[float]] = {}
    for layer, role, value in values:
        sums.setdefault((layer, role), []).append(value)
    return {key: sum(group) / len(group) for key, group in sums.items()}


def _grid(values: dict[tuple[int | None, str], float], layers: list[int], roles: list[str]) -> Grid:
    return [[values.get((layer, role)) for role in roles] for layer in layers]
