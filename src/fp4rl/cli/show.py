"""`fp4rl show`: everything about one run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json, styled
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from rich.table import Table

_FEW = 12


def command(
    run: Annotated[str, typer.Argument(help="suite/run-id, run id, or the beginning of either.")],
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    problem: Annotated[str | None, typer.Option(help="Show the answers to this problem instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run: how it was described, what it scored under which conditions, its evidence, curves and files.

    Example: `fp4rl show quickstart/w4a4-s0`
    """
    from fp4rl.lab.files import json_ready
    from fp4rl.lab.folders import RunFolder
    from fp4rl.lab.ledger.show import about, answers

    with opened(runs, ledger) as found, found.reading() as connection:
        everything = about(connection, run)
    if problem is not None:
        folder = RunFolder(runs / everything["run"]["suite"] / everything["run"]["run_id"])
        everything = {"run": everything["run"], "answers": answers(folder, problem)}
    if as_json:
        print_json(json_ready(everything))
    elif problem is not None:
        _print_answers(everything, problem)
    else:
        _print(everything)


def _print(about: dict[str, Any]) -> None:
    import yaml
    from rich.padding import Padding

    run, screen = about["run"], console()
    seed = f"seed {run['seed']}" if run["seed"] is not None else "seed not known"
    screen.print(styled((f"{run['suite']}/{run['run_id']}", "bold"), f"  arm {run['arm']}, {seed}"), highlight=False)
    wall = f", {run['wall_s']:.0f} s" if run["wall_s"] is not None else ""
    screen.print(
        f"{run['steps_done']} of {run['steps_asked'] or '?'} steps{wall}, code {run['code_digest']}", highlight=False
    )
    if run["imported"]:
        _print_source(run["imported"])
    if about["evaluations"]:
        screen.print(accuracies(about["evaluations"]))
    screen.print(styled(("evidence", "bold")), highlight=False)
    for gap in about["gaps"]:
        screen.print(styled("  ", ("missing", "red"), f": {gap}"), highlight=False)
    for kind, count in about["evidence_lines"].items():
        screen.print(f"  {kind}: {count} {'line' if count == 1 else 'lines'}", highlight=False)
    for name, value in run["evidence"].items():
        screen.print(f"  {name}: {_plain(value)}", highlight=False)
    for line in dict.fromkeys(about["warnings"]):
        screen.print(Padding(styled(("warning", "yellow"), f": {line}"), (0, 0, 0, 2), expand=False), highlight=False)
    _print_metrics(about["metrics"])
    files = about["artefacts"]
    size = sum(file["bytes"] for file in files) / 2**20
    screen.print(
        styled(("files", "bold"), f" {len(files)}, {size:.1f} MiB: {_some([f['path'] for f in files])}"),
        highlight=False,
    )
    described = about["spec"] or (run["imported"] or {}).get("config")
    if described:
        screen.print(styled(("described as", "bold")))
        text = yaml.safe_dump(_said(described), sort_keys=False, default_flow_style=None, width=screen.width - 8)
        screen.print(Padding(text, (0, 2)), highlight=False, markup=False)


def _print_source(source: dict[str, Any]) -> None:
    """Where a foreign log came from, and what was said of it when it was taken over."""
    said = [f"from {source['source']} ({source['dialect']})", source.get("status"), source.get("note")]
    console().print("; ".join(filter(None, said)), highlight=False, markup=False, soft_wrap=True)


def accuracies(evaluations: Sequence[dict[str, Any]]) -> "Table":
    """One line an evaluation: what acted while it was measured, and the shares with their intervals."""
    from rich.table import Table

    from fp4rl.lab.statistics.proportions import wilson

    table = Table(
        title="accuracy % (95 % interval over problems)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("step", "profile", "precision", "n", "strict", "flexible", "format", "tokens"):
        words = name in ("profile", "precision")  # these may go on below themselves, numbers stay whole
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in evaluations:
        conditions, n, strict = row["conditions"], row["n"], row["strict"]
        shown = _percent(strict)
        if n and strict is not None:
            low, high = wilson(round(strict * n), n)
            shown += f" [{100 * low:.1f}, {100 * high:.1f}]"
        cells = (_percent(row["flexible"]), _percent(row["formatted"]))
        step = f"{row['step']}{' last' if row['last'] else ''}"
        length = f"{row['mean_length']:.1f}" if row["mean_length"] is not None else "-"
        table.add_row(step, row["profile"], conditions.get("precision") or "?", str(n or "?"), shown, *cells, length)
    return table


def _print_metrics(metrics: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    if not metrics:
        return
    shown = {name: curve for name, curve in metrics.items() if not name.startswith("time/")}
    hidden = f", and {len(metrics) - len(shown)} of time (--json)" if len(shown) < len(metrics) else ""
    title = f"{len(shown)} curves{hidden}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("curve", "steps", "first", "last", "lowest", "highest"):
        number = name != "curve"  # a name may go on below itself, a number may not
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for name, curve in shown.items():
        numbers = (curve[key] for key in ("first", "last", "lowest", "highest"))
        table.add_row(name, str(curve["count"]), *("nan" if number is None else f"{number:.4g}" for number in numbers))
    console().print(table)


def _print_answers(found: dict[str, Any], problem: str) -> None:
    screen = console()
    screen.print(
        styled((f"{found['run']['suite']}/{found['run']['run_id']}", "bold"), f" on {problem}"), highlight=False
    )
    for answer in found["answers"]:
        verdict = "solved" if answer["strict"] else "not solved"
        where = f"step {answer['step']}, {answer['profile']}, sample {answer['sample']}"
        screen.print(f"{where}: {verdict}, {counted(answer['length'], 'token')}", highlight=False)
        if answer["completion"] is not None:
            screen.print(f"  {answer['completion']!r}", highlight=False, markup=False, soft_wrap=True)


def _said(spec: Any) -> Any:
    """The description without what it leaves at none."""
    if isinstance(spec, dict):
        return {key: _said(value) for key, value in spec.items() if value is not None}
    return spec


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items()) or "none"
    if value is None:
        return "not recorded"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
