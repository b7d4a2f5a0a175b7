"""`fp4rl ledger`: rebuild the database behind `runs`, `show` and `compare`, or describe it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, leave_out, print_json, progress
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.ledger.store import Ledger

app = typer.Typer(no_args_is_help=True, help="Rebuild the ledger from the run folders, or show what it holds.")


@app.command("rebuild")
def rebuild_ledger(
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Also drop runs whose folder is not here.")
    ] = False,
) -> None:
    """Empty the ledger and record every finished run again from its folder.

    Example: `fp4rl ledger rebuild --runs runs`
    """
    from fp4rl.lab.ledger.record import rebuild
    from fp4rl.lab.ledger.store import open_ledger

    _require_runs(runs)
    with open_ledger(ledger_address(runs, ledger), runs) as store, progress() as advance:
        on_run = partial(advance, "reading runs")
        count = rebuild(store, runs, drop_missing=drop_missing, on_run=on_run, on_damaged=leave_out)
    console().print(f"{counted(count, 'run')} recorded in {store.name}", soft_wrap=True)


@app.command("info")
def info(runs: RunsRoot = Path("runs"), ledger: Address = None, as_json: AsJson = False) -> None:
    """Show where the ledger is, its schema, and the number of rows of each table.

    Example: `fp4rl ledger info --ledger postgresql://lab@server/fp4rl`
    """
    from sqlalchemy import func, select

    from fp4rl.lab.ledger import tables

    with opened(runs, ledger) as store, store.reading() as connection:
        counts = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in (tables.runs, tables.evaluations, tables.documents)
        }
    if as_json:
        print_json({"ledger": store.name, "schema": tables.SCHEMA, "rows": counts})
        return
    console().print(f"{store.name}, schema {tables.SCHEMA}", soft_wrap=True)
    for table, count in counts.items():
        console().print(f"  {count:>9,} {table}")


@contextmanager
def opened(runs: Path, address: str | None) -> "Iterator[Ledger]":
    """Open the ledger with every finished run below `runs` in it. A run that cannot be read is named and left out."""
    from fp4rl.lab.ledger.store import Locked, Unusable, open_copy, open_ledger

    if address is None:
        _require_runs(runs)
    where = ledger_address(runs, address)
    with ExitStack() as at_last:
        ledger = at_last.enter_context(open_ledger(where, runs))
        try:
            _record_all(ledger, runs)
        except Unusable as error:
            if isinstance(error, Locked) or "://" in str(where):
                raise
            ledger = at_last.enter_context(open_copy(Path(where), runs))  # its disk is full
            _record_all(ledger, runs)
        yield ledger


def _record_all(ledger: "Ledger", runs: Path) -> None:
    from fp4rl.lab.ledger.record import record_new

    with progress() as advance:
        record_new(ledger, runs, partial(advance, "recording runs"), leave_out)


def _require_runs(runs: Path) -> None:
    if not runs.is_dir():
        raise NotFoundError(f"{runs}: no folder of runs here; name it with --runs, or make one with `fp4rl run`")


def ledger_address(runs: Path, address: str | None) -> str | Path:
    """Return the address of the ledger of a folder of runs: the named one, else the folder's own file."""
    return address or runs / "ledger.db"
