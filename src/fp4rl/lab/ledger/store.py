"""Open a ledger: SQLite, to which several processes may write at once, or PostgreSQL by address.

A ledger with an older schema is rebuilt from its own contents, then completed from the folders.
"""

import contextlib
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, StaticPool, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from fp4rl.lab.files import dumps
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.tables import Row, record_of, run_of, write
from fp4rl.lab.runs import Run
from fp4rl.spec.errors import InvalidValueError, NotFoundError

_WAIT_S = 20.0  # for another process's write to end
_UPGRADING = 7_406_015  # the advisory lock for making the tables of a PostgreSQL ledger
_OLD = ("experiments", "runs", "metrics", "evaluations", "evidence", "artefacts")
_DROPPED = ("items", "problem_lists", "alembic_version")


class Unusable(NotFoundError):
    """The ledger cannot be used now: its disk is full, or its server does not answer."""


class Locked(Unusable):
    """Another process has locked the ledger."""


@dataclass(frozen=True)
class Ledger:
    """An open ledger, accessed by `reading()` and `writing()`, each one transaction. `root`: the folder of its runs."""

    engine: Engine
    root: Path

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the ledger."""
        with self._usable(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection whose changes are committed at the end of the block, or undone on an exception."""
        with (
            self._usable(),
            self.engine.connect().execution_options(fp4rl_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Turn errors of the database (locked, damaged, gone, disk full) into one-line errors."""
        try:
            yield
        except (DatabaseError, sqlite3.DatabaseError) as error:  # the latter while a connection is being set up
            why = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
            if not isinstance(error, OperationalError | sqlite3.OperationalError):
                cure = "move it away, and `fp4rl ledger rebuild` makes a new one"
                raise InvalidValueError(f"{self.name}: {why}; {cure}") from None
            if "locked" in why:
                raise Locked(f"the ledger {self.name} is locked: another process writes to it; try again") from None
            raise Unusable(f"the ledger {self.name} cannot be used: {why}") from None

    @property
    def name(self) -> str:
        """The address without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_ledger(where: str | os.PathLike[str], root: Path | None = None) -> Ledger:
    """Open or create a ledger: a path means SQLite, `postgresql://user@host/name` a server.

    `root` is the folder of runs, by default the one that the SQLite file is in. What is recorded in a file that cannot
    be written (read-only, a full disk) is kept in memory until the ledger is closed.

    Raises `Unusable` for a server that does not answer, `NotFoundError` for a missing driver or folder,
    `InvalidValueError` for an invalid address and for a ledger of a newer version of fp4rl.
    """
    if "://" in str(where):
        return _ready(Ledger(_postgres(str(where)), root or Path("runs")))
    file = Path(where)
    try:
        return _ready(Ledger(_sqlite(file), root or file.parent))
    except Locked:
        raise
    except Unusable:
        if file.exists() and not file.is_file():
            raise
        return open_copy(file, root)


def open_copy(file: Path, root: Path | None = None) -> Ledger:
    """Open a copy in memory of the SQLite ledger `file`, which is empty where that cannot be read."""
    return _ready(Ledger(_sqlite(file, in_memory=True), root or file.parent))


def _ready(ledger: Ledger) -> Ledger:
    """Return the ledger with the tables of this version."""
    with ledger.reading() as connection:
        up_to_date = _schema(connection) == tables.SCHEMA
    if not up_to_date:
        with ledger.writing() as connection:
            _bring_up_to_date(connection)
    return ledger


def _sqlite(path: Path, *, in_memory: bool = False) -> Engine:
    if not path.parent.is_dir():
        raise NotFoundError(f"{path.parent}: no such folder, so no ledger is made there; name another folder")
    writable = not in_memory and all(
        os.access(p, os.W_OK) for p in (path if path.exists() else path.parent, path.parent)
    )
    if writable:
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _WAIT_S}, json_serializer=dumps)
    else:  # its contents, and what is recorded from the folders, are kept in memory
        settings = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        engine = create_engine("sqlite://", json_serializer=dumps, **settings)

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # the driver's implicit BEGIN would take the write lock too late
        if writable:
            _use_wal(connection)
        else:
            _copy(path, connection)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A reader that becomes a writer cannot wait for another writer, so writers take the lock at the start.
        writes = connection.get_execution_options().get("fp4rl_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _copy(path: Path, into: sqlite3.Connection) -> None:
    """Copy a read-only ledger into memory. Where it cannot be read either, the folders are read instead."""
    if not path.is_file():
        return
    with (
        contextlib.suppress(sqlite3.DatabaseError),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as archive,
    ):
        archive.backup(into)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, with which readers and a writer work at the same time.

    The first process to open the file changes its mode, and SQLite does not wait for that lock by itself.
    """
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgres(address: str) -> Engine:
    scheme, _, rest = address.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise InvalidValueError(f"a ledger is a file or postgresql://user@host/name; got the scheme {scheme!r}")
    try:
        return create_engine(make_url(f"postgresql+psycopg://{rest}"), json_serializer=dumps)
    except ModuleNotFoundError:
        raise NotFoundError("a PostgreSQL ledger needs psycopg: pip install 'fp4rl[postgres]'") from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise InvalidValueError(f"{error}; an address is written postgresql://user@host/name") from None


def _schema(connection: Connection) -> str | None:
    """Return the version of the schema; None for an empty database."""
    for table, column in ((tables.schema.name, "version"), ("alembic_version", "version_num")):
        if connection.dialect.has_table(connection, table):
            version: str | None = connection.execute(text(f"SELECT {column} FROM {table}")).scalar()
            return version
    return None


def _bring_up_to_date(connection: Connection) -> None:
    """Make the tables of this version, and copy every run of the old ones into them.

    Schemas 0001 and 0002 spread a run over several tables; their packed items are dropped, since the run folders have
    them. Raises `InvalidValueError` for a ledger of a newer version.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADING})"))
    version = _schema(connection)
    if version == tables.SCHEMA:  # another process came first
        return
    if version not in (None, "0001", "0002"):
        raise InvalidValueError(
            f"this ledger was made by a newer fp4rl (schema {version}); update fp4rl, or name another file"
        )
    runs: list[tuple[Run, Row]] = []
    if version is not None:
        old = MetaData()
        old.reflect(connection, only=lambda name, _: name in (*_OLD, *_DROPPED))  # no other tables of the database
        runs = _old_runs(connection, old)
        old.drop_all(connection)
    tables.metadata.create_all(connection)
    connection.execute(tables.schema.insert().values(version=tables.SCHEMA))
    for run, record in runs:
        write(connection, run, record)


def _old_runs(connection: Connection, old: MetaData) -> list[tuple[Run, Row]]:
    """Return every run of the old tables, without a checksum, so that it is read again if its folder exists."""
    rows = {name: [dict(row) for row in connection.execute(select(old.tables[name])).mappings()] for name in _OLD}
    specs = {row["digest"]: row["spec"] for row in rows["experiments"]}
    of_run: dict[str, dict[int, list[Row]]] = {name: defaultdict(list) for name in _OLD}
    for name in ("metrics", "evaluations", "evidence", "artefacts"):
        for row in rows[name]:
            of_run[name][row.pop("run")].append(row)
    return [_old_run(row, specs, {name: of_run[name][row["id"]] for name in of_run}) for row in rows["runs"]]


def _old_run(run: Row, specs: dict[str, Row], of_run: dict[str, list[Row]]) -> tuple[Run, Row]:
    evaluations = [row | {"profile": row["conditions"] | {"name": row["profile"]}} for row in of_run["evaluations"]]
    metrics: dict[int, Row] = defaultdict(dict)
    for row in of_run["metrics"]:  # SQLite stores NaN as NULL
        metrics[row["step"]][row["name"]] = float("nan") if row["value"] is None else row["value"]
    spec = specs.get(run["experiment"], {})
    lines = [row["content"] for row in sorted(of_run["evidence"], key=lambda row: row["line"])]
    record = {
        **{name: run[name] for name in ("suite", "run_id", "sites_digest")},
        "spec": spec | {"seed": run["seed"]} if spec else {},
        "result": run | {"evaluations": evaluations},
        "evidence": lines,
    }
    try:
        old = run_of(record, metrics)
    except InvalidValueError as error:
        raise InvalidValueError(
            f"the ledger's record of {run['suite']}/{run['run_id']} cannot be read ({error}); the ledger is as it was: "
            "move it away, and `fp4rl ledger rebuild` makes a new one"
        ) from None
    return old, record_of(old, "", [], of_run["artefacts"])
