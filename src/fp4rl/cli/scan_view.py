"""Shows a scan on the terminal: a row for each layer, with cells for its weights and inputs; or compares two scans."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fp4rl.cli.terminal import console, heat_strip, styled, table
from fp4rl.diagnose.advice import Advice
from fp4rl.diagnose.compare import compare_checkpoints, compare_scans, require_difference, totals
from fp4rl.diagnose.findings import COLUMNS, findings, meanings, rule_results
from fp4rl.diagnose.report import EXPERT_COLUMNS, ScanReport
from fp4rl.numerics.errors import pooled
from fp4rl.spec.words import counted

_STYLES = {"fault": "bold red", "note": "dim"}
EXPERTS_SHOWN = 8
WORST_SHOWN = 1.5  # times the ideal error: the darkest cell
TOGETHER = {  # measures shown for all weights together, and their form
    "SQNR, dB": ("sqnr_db", ".2f"),
    "sum|e|/sum|w|": ("relative_l1", ".3f"),
    "zeroed": ("deadzone_share", ".1%"),
    "error": ("relative_l2", ".1%"),
    "scale": ("scale_bias", ".1%"),
    "dead zone": ("deadzone", ".1%"),
    "grid": ("grid_noise", ".1%"),
}


def show(report: ScanReport, advice: Advice | None) -> None:
    """Print the head, layers, findings, the thresholds of the verl fork, and advice with its reasons."""
    screen, injection = console(), report.table.injection
    sites = counted(len(report.table.plans), "site")
    screen.print(styled((report.model, "bold"), f" {injection.name}: {sites}"))
    if report.calibration:
        given = report.calibration
        texts, tokens = counted(given["texts"], "text"), counted(given["tokens"], "token")
        screen.print(f"{texts}, {tokens}, digest {given['digest']}")
    _show_together(screen, report)
    _show_layers(screen, report)
    if experts := report.expert_rows(EXPERTS_SHOWN):
        first, *numbers = EXPERT_COLUMNS
        rows = ((row[0].removeprefix("model.layers."), *row[1:]) for row in experts)  # a narrow screen cuts cells off
        screen.print(table(f"{first}=", *(f"{name}>" for name in numbers), rows=rows))
    for finding in findings(report):
        lines = [("-", Text(finding.text, style=_STYLES.get(finding.kind, "")))]
        if named := finding.named_sites():
            lines.append(("", Text(named, style="dim")))
        screen.print(table("", "", rows=lines))
    if results := rule_results(report):
        screen.print(styled(("fixed thresholds of the verl fork", "bold"), ", to compare with"))
        first, *others = COLUMNS
        screen.print(table(f"{first}=", *others, rows=(result.cells() for result in results)))
        screen.print(meanings(results), style="dim")
    if advice is not None:
        screen.print(styled((f"advice: {advice.strategy}", "bold")))
        screen.print(table("", "", rows=((" ", reason) for reason in advice.reasons)))


def compare(model: str, report: ScanReport, path: Path, other: dict[str, Any] | None, *, quiet: bool) -> None:
    """Print a scan beside `other` (None: the weights in `path`) and what differs most; CheckFailed if nothing does."""
    if other is None:
        delta = compare_checkpoints(path, model)
        require_difference(delta.identical, f"the weights of {path} and {model}")
        lines = [f"{t.name}: {t.relative:.3%}" for t in sorted(delta.tensors, key=lambda t: -t.relative)[:5]]
        words = "weights that differ most, |change| / |weight|"
    else:
        now = report.as_dict()
        changes = compare_scans(other, now)
        other_sites = other["model"] == now["model"] and other["sites_digest"] != now["sites_digest"]
        if not other_sites:  # with other sites left out, equal measures of the rest are no sign of an error
            require_difference(all(row.a == row.b for row in changes), f"the scans {path} and of {model}")
        if not quiet:
            rows = ((total.name, f"{total.a:.4g}", f"{total.b:.4g}") for total in totals(other, now))
            console().print(table("=", f"{path.name}>", "this scan>", rows=rows))
        errors = sorted((r for r in changes if r.measure == "relative_l2"), key=lambda r: -abs(r.b - r.a))[:5]
        lines = [f"{r.site} {r.part}: {r.a:.4f} -> {r.b:.4f}" for r in errors]
        words = "sites whose relative error differs most"
    if not quiet:
        console().print(f"{words}:\n  " + "\n  ".join(lines))


def _show_together(screen: Console, report: ScanReport) -> None:
    weights = [part for part in report.parts if part.part == "weight"]
    if not report.tallies or not weights:
        return
    measures = {"all weights": pooled(list(report.tallies.values())).measures(), "ideal Gaussian": weights[0].ideal}
    rows = (
        (name, *(f"{values[measure]:{form}}" for measure, form in TOGETHER.values()))
        for name, values in measures.items()
    )
    screen.print(table("=", *(f"{name}>" for name in TOGETHER), rows=rows))
    screen.print("scale, dead zone and grid are parts of each value's error, with signs", style="dim")


def _show_layers(screen: Console, report: ScanReport) -> None:
    layers = sorted({plan.site.layer for plan in report.table.plans if plan.site.layer is not None})
    roles = list(dict.fromkeys(plan.site.role for plan in report.table.plans if plan.site.layer is not None))
    columns: dict[str, dict[int | None, Text]] = {
        "weights": _strips(report, "weight", layers, roles),
        "inputs": _strips(report, "input", layers, roles),
        "KL": _kl(report, layers),
        "left out": _saved(report),
        "stream": {d.layer: Text(f"{d.both:.1%}") for d in report.depth},
        "gain": {d.layer: Text(f"{d.gain:.2f}") for d in report.dynamics.layers} if report.dynamics else {},
        "fault": {s.layer: Text(s.kind, style="red") for s in reversed(report.verdict.suspects)}
        if report.verdict
        else {},
    }
    shown = {name: cells for name, cells in columns.items() if cells}
    names = (f"{name}=" if name in ("weights", "inputs", "fault") else f"{name}>" for name in ("layer", *shown))
    rows = ((str(layer), *(cells.get(layer, "") for cells in shown.values())) for layer in layers)
    screen.print(table(*names, rows=rows, lines=True))
    scale = f"0 is the format's ideal error, 9 is {WORST_SHOWN:g} times it"
    screen.print(f"cells: {' '.join(roles)}; {scale}", style="dim")


def _strips(report: ScanReport, part: str, layers: list[int], roles: list[str]) -> dict[int | None, Text]:
    excess: dict[tuple[int | None, str], list[float]] = {}
    for error in report.parts:
        if error.part == part:
            excess.setdefault((error.layer, error.role), []).append(error.excess)
    if not excess:
        return {}
    return {
        layer: heat_strip([max(excess.get((layer, role), [float("nan")])) for role in roles], 1.0, WORST_SHOWN)
        for layer in layers
    }


def _kl(report: ScanReport, layers: list[int]) -> dict[int | None, Text]:
    if report.sensitivity is None:
        return {}
    severity = report.severity()
    worst = max(severity.values(), default=0.0) or 1.0
    values = {layer: severity.get(layer, 0.0) for layer in layers}
    return {layer: Text(f"{value:.4f} ") + heat_strip([value], 0.0, worst) for layer, value in values.items()}


def _saved(report: ScanReport) -> dict[int | None, Text]:
    """Add up, by layer, the KL that leaving each of its sites out saves."""
    saved: dict[int | None, float] = {}
    for site in report.sensitivity.sites if report.sensitivity is not None else ():
        if site.leave_one_out is not None:
            saved[site.layer] = saved.get(site.layer, 0.0) + site.leave_one_out.kl
    return {layer: Text(f"{value:.4f}") for layer, value in saved.items()}
