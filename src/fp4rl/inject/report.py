"""Evidence as rows for a file, and as lines for a reader."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from fp4rl.inject.plan import SiteTable
from fp4rl.inject.state import SiteState, label
from fp4rl.spec.modes import PHASES, Phase


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
    head = f"{len(table.plans)} sites, table {table.digest}, phase {phase}"
    return "\n".join([head, *(_line(key, group) for key, group in groups.items())])


def _line(key: tuple[str, str, str], rows: list[dict[str, Any]]) -> str:
    phase, point, fmt = key
    calls, elements = sum(row["calls"] for row in rows), sum(row["elements"] for row in rows)
    changed, error = _mean(rows, "share_changed"), _mean(rows, "relative_error")
    counts = f"{len(rows):>4} sites {calls:>9} calls {elements:>13} harmed"
    return f"{phase:<10} {point:<12} {fmt:<10} {counts} {changed:>6} changed {error:>7} error"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{sum(values) / len(values):.2%}" if values else "-"
