"""The whole ledger again from the run folders, in one transaction: readers see the old one until the new one stands."""

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, delete, text

from fp4rl.lab.folders import finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.record import known_content, rows_of, write_rows
from fp4rl.lab.ledger.store import Ledger
from fp4rl.spec.mistakes import BadValue


def rebuild(
    ledger: Ledger, root: Path, *, drop_missing: bool = False, on_run: Callable[[int, int], None] | None = None
) -> int:
    """Empty the ledger and record every finished run below `root`; how many those were.

    Raises `BadValue` where the ledger holds runs without a folder here (a shared ledger, a folder moved away), unless
    `drop_missing` says that they may go. `on_run(done, total)` is called after each run.
    """
    folders = finished_runs(root)
    with ledger.writing() as connection:
        _keep_writers_waiting(connection)
        missing = sorted(set(known_content(connection)) - {(run.suite, run.run_id) for run in folders})
        if missing and not drop_missing:
            raise BadValue(_missing_message(missing, root))
        for table in (*tables.OF_A_RUN, tables.runs, tables.experiments, tables.problem_lists):
            connection.execute(delete(table))
        for done, folder in enumerate(folders, start=1):
            write_rows(connection, rows_of(folder))
            if on_run:
                on_run(done, len(folders))
    return len(folders)


def _keep_writers_waiting(connection: Connection) -> None:
    """SQLite's write lock does so by itself. The order of the tables is that in which a writer touches them."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE experiments, problem_lists, runs IN SHARE ROW EXCLUSIVE MODE"))


def _missing_message(missing: list[tuple[str, str]], root: Path) -> str:
    names = ", ".join("/".join(name) for name in missing[:3]) + (" ..." if len(missing) > 3 else "")
    return f"{len(missing)} runs of this ledger have no folder below {root} ({names}); --drop-missing forgets them"
