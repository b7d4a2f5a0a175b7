"""The whole ledger again from the run folders, in one transaction: readers see the old one until the new one stands."""

from pathlib import Path

from sqlalchemy import Connection, delete, text

from fp4rl.lab.damage import Damaged, OnDamaged, tell
from fp4rl.lab.folders import finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.record import OnRun, known_content, rows_of, write_rows
from fp4rl.lab.ledger.store import Ledger
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.words import agreeing, counted


def rebuild(
    ledger: Ledger,
    root: Path,
    *,
    drop_missing: bool = False,
    on_run: OnRun | None = None,
    on_damaged: OnDamaged | None = None,
) -> int:
    """Empty the ledger and record every finished run below `root`; how many those were.

    Raises `InvalidValueError` where the ledger holds runs without a folder here (a shared ledger, a folder moved away),
    unless `drop_missing` says that they may go. `on_run(done, total)` is called after each run, `on_damaged` for a run
    that cannot be read and is left out; without it nothing is changed and the first of these is raised.
    """
    folders = finished_runs(root)
    with ledger.writing() as connection:
        _keep_writers_waiting(connection)
        missing = sorted(set(known_content(connection)) - {(run.suite, run.run_id) for run in folders})
        if missing and not drop_missing:
            raise InvalidValueError(_missing_message(missing, root))
        for table in (*tables.OF_A_RUN, tables.runs, tables.experiments, tables.problem_lists):
            connection.execute(delete(table))
        damaged: list[Damaged] = []
        for done, folder in enumerate(folders, start=1):
            try:
                write_rows(connection, rows_of(folder), folder)
            except Damaged as error:
                damaged.append(error)
            if on_run:
                on_run(done, len(folders))
        tell(damaged, on_damaged)  # raises within the transaction where nobody listens
    return len(folders) - len(damaged)


def _keep_writers_waiting(connection: Connection) -> None:
    """SQLite's write lock does so by itself. The order of the tables is that in which a writer touches them."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("LOCK TABLE experiments, problem_lists, runs IN SHARE ROW EXCLUSIVE MODE"))


def _missing_message(missing: list[tuple[str, str]], root: Path) -> str:
    names = ", ".join("/".join(name) for name in missing[:3]) + (" ..." if len(missing) > 3 else "")
    have, them = agreeing(len(missing), "has", "have"), agreeing(len(missing), "it", "them")
    some = f"{counted(len(missing), 'run')} of this ledger {have} no folder below {root} ({names})"
    return f"{some}; --drop-missing forgets {them}"
