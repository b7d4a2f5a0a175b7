"""The heat map of sites: how far rounding moved each site's operands, by layer and role."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

from fp4rl.lab.runs import Run
from fp4rl.lab.suites import SuiteRun
from fp4rl.pages.page import HEAT, Figure, Layout
from fp4rl.spec.evidence import Injected

MOST_MAPS = 8
_Cell = tuple[int | None, str]  # layer, role


def heat_maps(by_arm: Mapping[str, Sequence[SuiteRun]]) -> Figure | None:
    """Return a heat map for each arm and operand with rounded sites, of its first comparable run, one seen at a time.

    None where no run recorded an error by site. At most MOST_MAPS are kept.
    """
    runs = {
        arm: next((run.run for run in own if run.counts and run.run is not None), None) for arm, own in by_arm.items()
    }
    maps = [(f"{arm}, {point}s", cells) for arm, run in runs.items() if run for point, cells in _cells(run).items()]
    if not maps:
        return None
    shown = maps[:MOST_MAPS]
    layers = sorted({layer for _, cells in shown for layer, _ in cells}, key=lambda layer: (layer is None, layer))
    roles = list(dict.fromkeys(role for _, cells in shown for _, role in cells))
    names = [f"layer {layer}" if layer is not None else "no layer" for layer in layers]
    traces = [
        {
            "type": "heatmap",
            "z": [[cells.get((layer, role)) for role in roles] for layer in layers],
            "x": roles,
            "y": names,
            "colorscale": HEAT,
            "visible": number == 0,
            "hovertemplate": "%{y}, %{x}: %{z:.1f} %<extra>" + label.replace("<", "&lt;") + "</extra>",
            "xgap": 2,
            "ygap": 2,
            "colorbar": {"title": {"text": "%"}, "thickness": 12, "nticks": 4},
        }
        for number, (label, cells) in enumerate(shown)
    ]
    worst = max(
        ((value, label, cell) for label, cells in shown for cell, value in cells.items()), key=lambda own: own[0]
    )
    words = f"Relative error of rounding by layer and role; the largest is {worst[0]:.1f} % ({worst[1]}, {worst[2][1]})"
    return Figure("sites", "", words, traces, _layout(names, [label for label, _ in shown]))


def _cells(run: Run) -> dict[str, dict[_Cell, float]]:
    """Return operand -> (layer, role) -> median relative error in percent, of rollouts or else of any phase."""
    places = {plan.site: (plan.layer, plan.role or plan.site) for plan in run.sites.plans or ()}
    rows = [row for row in run.of(Injected) if row.relative_error is not None and row.site in places]
    rollout = [row for row in rows if row.phase == "rollout"]
    by_point: dict[str, dict[_Cell, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rollout or rows:
        by_point[row.point][places[row.site]].append(100 * (row.relative_error or 0.0))
    return {point: {cell: median(values) for cell, values in cells.items()} for point, cells in by_point.items()}


def _layout(names: Sequence[str], labels: Sequence[str]) -> Layout:
    buttons = [
        {"label": label, "method": "update", "args": [{"visible": [n == m for m in range(len(labels))]}]}
        for n, label in enumerate(labels)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 8}}
    axes = {"xaxis": {"type": "category"}, "yaxis": {"type": "category", "automargin": True, "autorange": "reversed"}}
    height = max(220, min(900, 110 + 26 * len(names)))
    return {"height": height, "margin": {"l": 8, "r": 8, "t": 48, "b": 60}, "updatemenus": [menu]} | axes
