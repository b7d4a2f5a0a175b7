"""Run-to-run spread of every task and model of which the ledger holds repeats."""

from typing import Any

from sqlalchemy import Connection, select

from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.query import find_run, repeats
from fp4rl.lab.statistics.spread import Spread, pooled


def known_spreads(connection: Connection, like: str | None = None) -> list[tuple[str, Spread]]:
    """(task on model, spread of the last strict accuracies in points); with `like` only those of that run's kind."""
    table = tables.experiments.c
    query = select(table.task, table.model, table.spec)
    if like is not None:
        query = query.where(table.digest == find_run(connection, like)["experiment"])
    kinds = {(task, model): spec for task, model, spec in connection.execute(query)}
    found = []
    for (task, model), spec in sorted(kinds.items(), key=lambda item: item[0]):
        spread = pooled([100 * share for share in group] for group in repeats(connection, task, model))
        if spread is not None and spread.sd > 0:
            found.append((f"{_name(spec.get('task'))} on {_name(spec.get('model'))}", spread))
    return found


def _name(described: Any) -> str:
    """The name, the path's last part, or the first key of a part of a spec."""
    if not isinstance(described, dict):
        return str(described)
    if described.get("name"):
        return str(described["name"])
    if described.get("path"):
        return str(described["path"]).rstrip("/").rpartition("/")[2]
    return next((key for key, value in described.items() if value is not None), "?")
