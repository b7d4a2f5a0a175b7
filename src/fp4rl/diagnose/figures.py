"""The figures of a scan's page, as Plotly describes them."""

from collections.abc import Callable
from typing import Any

from fp4rl.diagnose.precision import PartError
from fp4rl.diagnose.report import ScanReport

Figure = dict[str, Any]

INK, QUIET, BEFORE, AFTER = "#1f2430", "#8a93a3", "#7aa6c2", "#c2571a"
_HEAT = [[0.0, "#f7f4ee"], [0.35, "#f2c879"], [0.7, "#d9722e"], [1.0, "#7d1f14"]]
_LAYOUT: dict[str, Any] = {
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "margin": {"l": 70, "r": 20, "t": 30, "b": 50},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": QUIET, "activecolor": INK},
    "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
}
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


def heat_map(report: ScanReport) -> Figure | None:
    """Layers x projections, with a menu of measures; KL first where it was looked at."""
    layers = sorted({plan.site.layer for plan in report.table.plans if plan.site.layer is not None})
    roles = list(dict.fromkeys(plan.site.role for plan in report.table.plans if plan.site.layer is not None))
    grids = [(label, _grid(values, layers, roles), worse) for label, values, worse in _by_place(report)]
    grids = [found for found in grids if any(v is not None for row in found[1] for v in row)]
    if not grids:
        return None
    traces = [
        {
            "type": "heatmap",
            "z": grid,
            "x": roles,
            "y": [f"layer {layer}" for layer in layers],
            "colorscale": _HEAT,
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
    height = 150 + 26 * len(layers)
    layout = _LAYOUT | {
        "height": height,
        "updatemenus": [menu],
        "yaxis": {"autorange": "reversed"},
        "margin": {"l": 80, "r": 20, "t": 70, "b": 40},
    }
    return {"data": traces, "layout": layout}


def sensitivity_bars(report: ScanReport) -> Figure | None:
    """The sites with the greatest KL: measured alone, and what one backward pass predicted."""
    if report.sensitivity is None or not report.sensitivity.sites:
        return None
    ranked = sorted(report.sensitivity.sites, key=lambda site: site.kl)[-MOST_BARS:]
    names = [site.name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "") for site in ranked]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "measured" if ranked[0].leave_one_in is not None else "estimated",
        "x": [site.kl for site in ranked],
        "y": names,
        "marker": {"color": BEFORE},
        "hovertemplate": "%{y}: %{x:.4g} nats<extra></extra>",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "estimate of one backward pass",
        "x": [site.estimate for site in ranked],
        "y": names,
        "marker": {"color": AFTER, "symbol": "line-ns-open", "size": 12, "line": {"width": 2}},
    }
    saved = {
        "type": "scatter",
        "mode": "markers",
        "name": "saved when it alone is left out",
        "x": [site.leave_one_out.kl if site.leave_one_out is not None else None for site in ranked],
        "y": names,
        "marker": {"color": INK, "symbol": "circle-open", "size": 8},
    }
    shown = [bars] + [marks] * (ranked[0].leave_one_in is not None) + [saved] * (ranked[0].leave_one_out is not None)
    known = "" if ranked[0].leave_one_in is not None else " (estimated)"
    layout = _LAYOUT | {
        "height": 120 + _ROW * len(ranked),
        "margin": {"l": 130, "r": 20, "t": 50, "b": 50},
        "xaxis": {"title": {"text": f"KL, nats per token{known}"}, "rangemode": "tozero"},
        "yaxis": {"automargin": True, "ticksuffix": " "},
    }
    return {"data": shown, "layout": layout}


def depth_lines(report: ScanReport) -> Figure | None:
    """Error of the residual stream after each layer: weights alone, inputs alone, both, and what independence gives."""
    if not report.depth:
        return None
    x = [found.layer for found in report.depth]
    lines = (
        ("weights alone", [d.weights for d in report.depth], {"color": BEFORE}),
        ("inputs alone", [d.inputs for d in report.depth], {"color": QUIET}),
        ("both", [d.both for d in report.depth], {"color": AFTER, "width": 3}),
        ("if independent", [d.predicted for d in report.depth], {"color": INK, "dash": "dot"}),
    )
    data = [
        {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": line}
        for name, y, line in lines
        if any(y)
    ]
    layout = _LAYOUT | {
        "height": 340,
        "xaxis": {"title": {"text": "after layer"}, "dtick": max(1, len(x) // 14), "zeroline": False},
        "yaxis": {"title": {"text": "error / stream"}, "tickformat": ".0%", "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout}


def before_and_after(report: ScanReport) -> Figure | None:
    """Histogram of one weight before and after rounding, on a logarithmic axis so that the tails show.

    What lies beyond four root mean squares is in the last bins.
    """
    found = report.distribution
    if found is None:
        return None
    centres = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
    step = {"shape": "hvh"}
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "after",
            "x": centres,
            "y": found.after,
            "line": step | {"color": AFTER, "width": 1},
            "fill": "tozeroy",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "before",
            "x": centres,
            "y": found.before,
            "line": step | {"color": INK},
        },
    ]
    layout = _LAYOUT | {
        "height": 320,
        "xaxis": {"title": {"text": "value / root mean square"}, "zeroline": False},
        "yaxis": {"title": {"text": "values"}, "type": "log", "dtick": 1},
    }
    return {"data": data, "layout": layout}


def _by_place(report: ScanReport) -> list[tuple[str, dict[tuple[int | None, str], float], bool]]:
    """(label, (layer, role) -> value, whether more is worse); places that share layer and role are averaged."""
    found = []
    if report.sensitivity is not None:
        measured = [(site.layer, site.role, site.kl) for site in report.sensitivity.sites]
        found.append(("KL of the site alone, nats per token", _averaged(measured), True))
    for label, part, measure, worse in _MEASURES:
        read = _reader(measure)
        values = [(p.layer, p.role, v) for p in report.parts if p.part == part and (v := read(p)) is not None]
        found.append((label, _averaged(values), worse))
    return found


def _reader(measure: str) -> Callable[[PartError], float | None]:
    return (lambda part: part.excess) if measure == "excess" else (lambda part: part.measures.get(measure))


def _averaged(values: list[tuple[int | None, str, float]]) -> dict[tuple[int | None, str], float]:
    sums: dict[tuple[int | None, str], list[float]] = {}
    for layer, role, value in values:
        sums.setdefault((layer, role), []).append(value)
    return {place: sum(found) / len(found) for place, found in sums.items()}


def _grid(values: dict[tuple[int | None, str], float], layers: list[int], roles: list[str]) -> list[list[float | None]]:
    return [[values.get((layer, role)) for role in roles] for layer in layers]
