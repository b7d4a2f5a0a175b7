"""Evidence as rows for a file, and as lines for a reader."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from fp4rl.inject.plan import SiteTable
from fp4rl.inject.state import SiteState, label
from fp4rl.spec.modes import PHASES, Phase
from fp4rl.spec.words import counted


def evidence_rows(states: Iterable[SiteState]) -> list[dict[str, Any]]:
    """One row per phase, site and point, in the order of the phases and of the model."""
    rows = []
    for state in states:
        state.book()
        for (phase, point), meter in state.meters.items():
            where = {"phase": phase, "site": state.plan.name, "point": point, "format": label(state.plan, point)}
            rows.append({**where, **meter.row()})
    return sorted(rows, key=lambda row: PHASES.index(row["phase"]))


def report(table: SiteTable, phase: Phase, rows: Iterable[dict[str, Any]]) -> str:
    """A line per phase and point: sites, calls, elements, and the mean over sites of what was measured."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["phase"], row["point"], row["format"]].append(row)
    lines = [(*key, *_counts(group)) for key, group in groups.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    head = f"{counted(len(table.plans), 'site')}, table {table.digest}, phase {phase}"
    return "\n".join([head, *("  ".join(_aligned(line, widths)) for line in lines)])


def _aligned(cells: Iterable[str], widths: list[int]) -> Iterable[str]:
    """Words (phase, point, format) to the left, counts to the right."""
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if place < 3 else cell.rjust(width)


def _counts(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    calls, elements = sum(row["calls"] for row in rows), sum(row["elements"] for row in rows)
    counts = f"{counted(len(rows), 'site')}", f"{counted(calls, 'call')}", f"{elements} harmed"
    return *counts, f"{_mean(rows, 'share_changed')} changed", f"{_mean(rows, 'relative_error')} error"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{sum(values) / len(values):.2%}" if values else "-"
