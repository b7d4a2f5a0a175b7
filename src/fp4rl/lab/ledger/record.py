"""Record run folders in the ledger: each run wholly or not at all, and with the same rows every time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection, delete, select, text
from sqlalchemy.exc import OperationalError, StatementError

from fp4rl.lab.files import Damaged, OnDamaged, tell
from fp4rl.lab.folders import RunFolder, finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.store import Ledger
from fp4rl.lab.ledger.tables import Row, content_of, read_folder, write
from fp4rl.lab.runs import Run
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.words import agreeing, counted

OnRun = Callable[[int, int], None]
Known = Mapping[tuple[str, str], str]


def record_new(ledger: Ledger, root: Path, on_run: OnRun | None = None, on_damaged: OnDamaged | None = None) -> int:
    """Record every finished run below `root` that is not in the ledger as it is; return their number.

    `on_run(done, total)` is called after each, `on_damaged` for a run that cannot be read and is left out; without the
    latter the first such error is raised after all others are recorded. Several processes may call it at once.
    """
    with ledger.reading() as connection:
        known = known_content(connection)
    return _record_each(finished_runs(root), lambda folder: record(ledger, folder, known), on_run, on_damaged)


def record(ledger: Ledger, folder: RunFolder, known: Known) -> bool:
    """Record a finished run; return False where `known` holds exactly this result; `NotFoundError` if unfinished."""
    if known.get((folder.suite, folder.run_id)) == content_of(folder):
        return False
    run, entry = read_folder(folder)
    with ledger.writing() as connection:
        return _write_whole(connection, folder, run, entry)


def rebuild(
    ledger: Ledger,
    root: Path,
    *,
    drop_missing: bool = False,
    on_run: OnRun | None = None,
    on_damaged: OnDamaged | None = None,
) -> int:
    """Empty the ledger and record every finished run below `root`, in one transaction; return their number.

    Raises `InvalidValueError` where the ledger holds runs without a folder here (a shared ledger, a moved folder),
    unless `drop_missing`. The callbacks are those of `record_new`; a damaged run without `on_damaged` leaves the ledger
    unchanged.
    """
    folders = finished_runs(root)
    with ledger.writing() as connection:
        if connection.dialect.name == "postgresql":  # in SQLite other writers wait for the write lock anyway
            connection.execute(text("LOCK TABLE runs IN SHARE ROW EXCLUSIVE MODE"))
        missing = sorted(set(known_content(connection)) - {(run.suite, run.run_id) for run in folders})
        if missing and not drop_missing:
            raise InvalidValueError(_missing_message(missing, root))
        for table in (tables.documents, tables.evaluations, tables.runs):
            connection.execute(delete(table))
        return _record_each(
            folders, lambda folder: _write_whole(connection, folder, *read_folder(folder)), on_run, on_damaged
        )


def _record_each(
    folders: Sequence[RunFolder],
    record: Callable[[RunFolder], bool],
    on_run: OnRun | None,
    on_damaged: OnDamaged | None,
) -> int:
    """Return how many runs `record` entered; damaged ones are reported after all others."""
    damaged, recorded = list[Damaged](), 0
    for done, folder in enumerate(folders, start=1):
        try:
            recorded += record(folder)
        except Damaged as error:
            damaged.append(error)
        if on_run:
            on_run(done, len(folders))
    tell(damaged, on_damaged)
    return recorded


def known_content(connection: Connection) -> Known:
    """Return (suite, run id) -> digest of the result in the ledger."""
    table = tables.runs.c
    rows = connection.execute(select(table.suite, table.run_id, table.content))
    return {(suite, run_id): content for suite, run_id, content in rows}


def _write_whole(connection: Connection, folder: RunFolder, run: Run, entry: Row) -> bool:
    """Replace the run; raise `Damaged`, and leave the ledger unchanged, where a value does not fit its column."""
    try:
        with connection.begin_nested():
            write(connection, run, entry)
            return True
    except (StatementError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, OperationalError):
            raise
        why = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise Damaged(f"{folder.path} is damaged ({why}); put back a copy, or move it away") from error


def _missing_message(missing: list[tuple[str, str]], root: Path) -> str:
    names = ", ".join("/".join(name) for name in missing[:3]) + (" ..." if len(missing) > 3 else "")
    have, them = agreeing(len(missing), "has", "have"), agreeing(len(missing), "it", "them")
    some = f"{counted(len(missing), 'run')} of this ledger {have} no folder below {root} ({names})"
    return f"{some}; --drop-missing forgets {them}"
