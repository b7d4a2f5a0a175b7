"""The ledger on a real PostgreSQL server, which these tests start and stop."""

import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import MetaData, create_engine, event, select, text

from fp4rl.lab.folders import RunFolder, finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.record import rebuild, record, record_new
from fp4rl.lab.ledger.store import open_ledger

_DEBIAN = Path("/usr/lib/postgresql")


def _program(name: str) -> str | None:
    """From the path, or from where Debian puts the programs of each version."""
    versions = sorted(_DEBIAN.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(versions[-1]) if versions else shutil.which(name)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a fresh server, up to the name of a database."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra 'postgres')")
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if not (initdb and pg_ctl):
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    become: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="fp4rl-postgres-"))  # pytest's own folders are closed to other users
    if os.geteuid() == 0:  # the server refuses to run as root
        user = next((name for name in ("postgres", "nobody") if _has_user(name)), None)
        if user is None or not shutil.which("runuser"):
            pytest.skip("PostgreSQL refuses root, and there is no other user to run it as")
        become = ["runuser", "-u", user, "--"]
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = str(folder / "data")
    _run([*become, initdb, "-D", data, "-U", "lab", "-A", "trust", "-E", "UTF8", "--no-sync"], folder)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    _run([*become, pg_ctl, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "-t", "60", "start"], folder)
    yield f"postgresql://lab@127.0.0.1:{port}/"
    _run([*become, pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"], folder)
    shutil.rmtree(folder)


def _has_user(name: str) -> bool:
    import pwd

    return any(entry.pw_name == name for entry in pwd.getpwall())


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def address(server: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty database of this test's own."""
    import psycopg

    name = request.node.name[:60].lower()
    with psycopg.connect(server + "postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server + name


def test_two_processes_that_write_at_once_lose_nothing_in_postgresql(
    opened, make_run, write_at_once, all_rows, address: str, tmp_path: Path
):
    for seed in range(16):
        make_run("bf16", seed, [True, False] * 20)
    runs = finished_runs(tmp_path / "runs")
    write_at_once(address, runs[:11], runs[5:])
    alone = opened(tmp_path / "alone.db")
    rebuild(alone, tmp_path / "runs")
    assert all_rows(opened(address)) == all_rows(alone)


def test_a_postgresql_ledger_rebuilds_to_the_same_rows(opened, make_run, all_rows, address: str, tmp_path: Path):
    make_run("bf16", 0, [True, False] * 20)
    make_run("w4a4", 0, [True] * 40, spec={"injection": {"mode": "w4a4"}})
    ledger = opened(address)
    record_new(ledger, tmp_path / "runs")
    before = all_rows(ledger)
    rebuild(ledger, tmp_path / "runs")
    assert all_rows(ledger) == before
    assert len(before["documents"]) == 2


def test_a_postgresql_ledger_of_the_previous_schema_keeps_every_run(opened, all_rows, address: str, tmp_path: Path):
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.executescript(Path(__file__).with_name("ledger_0002.sql").read_text())
    source, target = create_engine(f"sqlite:///{tmp_path}/old.db"), opened(address).engine
    old = MetaData()
    event.listen(old, "column_reflect", lambda *given: given[2].update(type=given[2]["type"].as_generic()))
    with source.connect() as reading, target.begin() as writing:
        tables.metadata.drop_all(writing)
        old.reflect(reading)
        old.create_all(writing)
        for table in old.sorted_tables:
            writing.execute(table.insert(), [dict(row) for row in reading.execute(select(table)).mappings()])
        writing.execute(text("CREATE TABLE of_others AS SELECT 1 AS one"))
    rows = all_rows(opened(address))
    assert rows == all_rows(opened(tmp_path / "old.db"))
    assert (len(rows["runs"]), len(rows["evaluations"])) == (3, 6)
    with target.connect() as reading:
        assert reading.execute(text("SELECT one FROM of_others")).scalar() == 1


def test_recording_while_another_rebuilds_loses_nothing_in_postgresql(
    make_run, opened, all_rows, address: str, tmp_path: Path
):
    for seed in range(12):
        make_run("bf16", seed, [True, False] * 20)
    runs = finished_runs(tmp_path / "runs")
    opened(address)
    with ThreadPoolExecutor(3) as pool:
        deeds = [pool.submit(_recorded, address, runs[start::2]) for start in (0, 1)]
        deeds.append(pool.submit(_rebuilt, address, tmp_path / "runs"))
        for deed in deeds:
            deed.result(timeout=60)
    assert len(all_rows(opened(address))["runs"]) == 12


def _recorded(address: str, runs: list[RunFolder]) -> None:
    with open_ledger(address) as ledger:
        for run in runs:
            record(ledger, run, {})


def _rebuilt(address: str, root: Path) -> None:
    with open_ledger(address) as ledger:
        for _ in range(3):
            rebuild(ledger, root)
