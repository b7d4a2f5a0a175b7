"""A scan on the terminal: one row a layer, with a strip of cells for its weights and one for its inputs."""

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fp4rl.cli.pictures import heat_strip

if TYPE_CHECKING:
    from rich.console import Console

    from fp4rl.diagnose.advice import Advice
    from fp4rl.diagnose.findings import Finding
    from fp4rl.diagnose.report import ScanReport

WORST_SHOWN = 1.5  # times the ideal error: the darkest cell
NAMED = 3  # sites named under a finding


def show(screen: "Console", report: "ScanReport") -> None:
    """Head, layers, findings and the rules of the documents."""
    from fp4rl.diagnose.findings import findings, rule_results
    from fp4rl.diagnose.rules import COLUMNS

    injection = report.table.injection
    screen.print(f"[bold]{escape(report.model)}[/] {injection.name}: {len(report.table.plans)} sites", highlight=False)
    if report.calibration:
        given = report.calibration
        screen.print(f"{given['texts']} texts, {given['tokens']} tokens, digest {given['digest']}", highlight=False)
    _show_together(screen, report)
    _show_layers(screen, report)
    for found in findings(report):
        _show_finding(screen, found)
    if judged := rule_results(report):
        screen.print("thresholds of earlier documents, kept for comparison:", highlight=False)
        table = Table(*COLUMNS, box=None, padding=(0, 2, 0, 2), style="dim", header_style="dim")
        for result in judged:
            table.add_row(*result.cells())
        screen.print(table)


def show_advice(screen: "Console", advice: "Advice") -> None:
    """The strategy and its reasons."""
    screen.print(f"[bold]advice: {advice.strategy}[/]")
    for reason in advice.reasons:
        screen.print(f"  {reason}", highlight=False)


def _show_together(screen: "Console", report: "ScanReport") -> None:
    from fp4rl.diagnose.tally import pooled

    weights = [part for part in report.parts if part.part == "weight"]
    if not report.tallies or not weights:
        return
    found, ideal = pooled(list(report.tallies.values())).measures(), weights[0].ideal
    screen.print(
        f"all weights: SQNR {found['sqnr_db']:.2f} dB (ideal {ideal['sqnr_db']:.2f}), "
        f"sum|e|/sum|w| {found['relative_l1']:.3f} ({ideal['relative_l1']:.3f}), "
        f"dead zone {found['deadzone_share']:.1%} ({ideal['deadzone_share']:.1%})",
        highlight=False,
    )
    parts = (("scale", "scale_bias"), ("dead zone", "deadzone"), ("grid", "grid_noise"))
    said = ", ".join(f"{word} {found[name]:.1%} ({ideal[name]:.1%})" for word, name in parts)
    error = f"error {found['relative_l2']:.1%} ({ideal['relative_l2']:.1%})"
    screen.print(f"{error}; its parts, which add with their signs: {said}", highlight=False)


def _show_layers(screen: "Console", report: "ScanReport") -> None:
    layers = sorted({plan.site.layer for plan in report.table.plans if plan.site.layer is not None})
    roles = list(dict.fromkeys(plan.site.role for plan in report.table.plans if plan.site.layer is not None))
    columns: dict[str, dict[int | None, Text]] = {
        "weights": _strips(report, "weight", layers, roles),
        "inputs": _strips(report, "input", layers, roles),
        "harm, KL": _harm(report, layers),
        "spared": _saved(report),
        "stream": {d.layer: Text(f"{d.both:.1%}") for d in report.depth},
        "gain": {d.layer: Text(f"{d.gain:.2f}") for d in report.dynamics.layers} if report.dynamics else {},
        "fault": {s.layer: Text(s.kind, style="red") for s in reversed(report.verdict.suspects)}
        if report.verdict
        else {},
    }
    shown = {name: cells for name, cells in columns.items() if cells}
    table = Table()
    for name in ("layer", *shown):
        table.add_column(name, justify="left" if name in ("weights", "inputs", "fault") else "right", no_wrap=True)
    for layer in layers:
        table.add_row(str(layer), *(cells.get(layer, Text("")) for cells in shown.values()))
    screen.print(table)
    scale = f"0 is the format's ideal error, 9 is {WORST_SHOWN:g} times it"
    screen.print(f"cells: {' '.join(roles)}; {scale}", style="dim", highlight=False)


def _strips(report: "ScanReport", part: str, layers: list[int], roles: list[str]) -> dict[int | None, Text]:
    found: dict[tuple[int | None, str], list[float]] = {}
    for one in report.parts:
        if one.part == part:
            found.setdefault((one.layer, one.role), []).append(one.excess)
    if not found:
        return {}
    return {
        layer: heat_strip([max(found.get((layer, role), [float("nan")])) for role in roles], 1.0, WORST_SHOWN)
        for layer in layers
    }


def _harm(report: "ScanReport", layers: list[int]) -> dict[int | None, Text]:
    if report.sensitivity is None:
        return {}
    severity = report.severity()
    worst = max(severity.values(), default=0.0) or 1.0
    cells: dict[int | None, Text] = {}
    for layer in layers:
        value = severity.get(layer, 0.0)
        cells[layer] = Text(f"{value:.4f} ") + heat_strip([value], 0.0, worst)
    return cells


def _saved(report: "ScanReport") -> dict[int | None, Text]:
    """KL that sparing each site of a layer saves, added up."""
    saved: dict[int | None, float] = {}
    for site in report.sensitivity.sites if report.sensitivity is not None else ():
        if site.spared is not None:
            saved[site.layer] = saved.get(site.layer, 0.0) + site.spared.kl
    return {layer: Text(f"{value:.4f}") for layer, value in saved.items()}


def _show_finding(screen: "Console", found: "Finding") -> None:
    style = {"fault": "bold red", "note": "dim"}.get(found.kind)
    screen.print(f"- {found.text}", style=style, highlight=False, markup=False)
    if found.sites and found.kind != "note":
        more = f" and {len(found.sites) - NAMED} more" if len(found.sites) > NAMED else ""
        screen.print(f"    {', '.join(found.sites[:NAMED])}{more}", style="dim", highlight=False, markup=False)
