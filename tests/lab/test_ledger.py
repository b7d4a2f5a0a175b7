"""The ledger: the same rows however often and in whatever order runs are recorded, and nothing lost between writers."""

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, text

from fp4rl.lab.folders import RunFolder, finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.migrate import migrate, newest
from fp4rl.lab.ledger.packing import pack, unpack_flags, unpack_lengths, unpack_problems
from fp4rl.lab.ledger.query import repeats
from fp4rl.lab.ledger.rebuild import rebuild
from fp4rl.lab.ledger.record import record, record_new
from fp4rl.lab.ledger.store import Ledger, open_ledger
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError, NotFoundError


@pytest.fixture
def ledger(opened, tmp_path: Path) -> Ledger:
    return opened(tmp_path / "ledger.db")


def _three_runs(make_run) -> list[RunFolder]:
    flags = np.random.default_rng(0).random((3, 40)) < 0.5
    return [
        make_run("bf16", 0, flags[0].tolist()),
        make_run("bf16", 1, flags[1].tolist()),
        make_run("w4a4", 0, flags[2].tolist(), spec={"injection": {"mode": "w4a4"}}),
    ]


def test_a_rebuilt_ledger_has_the_same_rows(opened, all_rows, make_run, ledger: Ledger, tmp_path: Path):
    for run in reversed(_three_runs(make_run)):
        record(ledger, run)
    before = all_rows(ledger)
    assert rebuild(ledger, tmp_path / "runs") == 3
    assert all_rows(ledger) == before
    fresh = opened(tmp_path / "fresh.db")
    rebuild(fresh, tmp_path / "runs")
    assert all_rows(fresh) == before
    assert {name: len(rows) for name, rows in before.items()} == {
        "experiments": 2,
        "runs": 3,
        "metrics": 18,
        "evaluations": 6,
        "problem_lists": 1,
        "items": 3,
        "evidence": 6,
        "artefacts": 18,
    }


def test_a_row_that_no_folder_explains_does_not_survive_a_rebuild(all_rows, make_run, ledger: Ledger, tmp_path: Path):
    runs = _three_runs(make_run)
    record_new(ledger, tmp_path / "runs")
    before = all_rows(ledger)
    with ledger.writing() as connection:
        number = tables.run_number(runs[0].suite, runs[0].run_id)
        connection.execute(tables.metrics.insert().values(run=number, step=99, name="made/up", value=1.0))
    assert all_rows(ledger) != before
    rebuild(ledger, tmp_path / "runs")
    assert all_rows(ledger) == before


def test_recording_twice_changes_nothing(all_rows, make_run, ledger: Ledger):
    run = make_run()
    assert record(ledger, run)
    before = all_rows(ledger)
    assert not record(ledger, run)
    assert all_rows(ledger) == before


def test_a_run_whose_result_changed_is_replaced_as_a_whole(make_run, ledger: Ledger):
    run = make_run(strict=[True] * 40)
    record(ledger, run)
    result = run.result() | {"wall_s": 99.0, "evaluations": []}
    (run.path / "result.json").write_text(json.dumps(result))
    assert record(ledger, run)
    with ledger.reading() as connection:
        assert connection.execute(select(tables.runs.c.wall_s)).scalars().all() == [99.0]
        assert connection.execute(select(tables.evaluations)).all() == []


def test_an_unfinished_run_is_not_recorded(make_run, ledger: Ledger, tmp_path: Path):
    run = make_run()
    (run.path / "result.json").unlink()
    with pytest.raises(NotFoundError, match="not finished"):
        record(ledger, run)
    assert record_new(ledger, tmp_path / "runs") == 0


def test_a_record_that_fails_halfway_leaves_nothing(
    all_rows, make_run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    monkeypatch.setattr("fp4rl.lab.ledger.record._artefacts", lambda *_: [{"run": 1, "path": "x", "bytes": None}])
    with pytest.raises(Exception, match="NOT NULL"):
        record(ledger, run)
    assert all_rows(ledger)["runs"] == []


def test_rebuilding_does_not_forget_runs_of_others_unless_told_to(all_rows, make_run, ledger: Ledger, tmp_path: Path):
    gone, kept = make_run(seed=0), make_run(seed=1)
    record_new(ledger, tmp_path / "runs")
    shutil.rmtree(gone.path)
    with pytest.raises(InvalidValueError, match="1 run of this ledger has no folder"):
        rebuild(ledger, tmp_path / "runs")
    assert len(all_rows(ledger)["runs"]) == 2
    assert rebuild(ledger, tmp_path / "runs", drop_missing=True) == 1
    assert [run.key for run in finished_runs(tmp_path / "runs")] == [kept.key]


def test_packed_items_come_back_problem_by_problem(make_run):
    flags = (np.random.default_rng(1).random(40) < 0.5).tolist()
    packed = pack(make_run(strict=flags).items(30, "deployment"))
    ids, samples = unpack_problems(packed.problems["packed"])
    assert ids == [f"p{index:04d}" for index in range(40)]
    assert samples == [0] * 40
    assert unpack_flags(packed.row["strict"], 40).tolist() == flags
    assert unpack_lengths(packed.row["lengths"]).tolist() == list(range(1, 41))


def test_two_processes_that_write_at_once_lose_nothing_in_sqlite(
    opened, all_rows, make_run, write_at_once, tmp_path: Path
):
    for seed in range(16):
        make_run("bf16", seed, [True, False] * 20)
    runs = finished_runs(tmp_path / "runs")
    write_at_once(str(tmp_path / "new.db"), runs[::2], runs[1::2])
    alone = opened(tmp_path / "alone.db")
    rebuild(alone, tmp_path / "runs")
    assert all_rows(opened(tmp_path / "new.db")) == all_rows(alone)


def test_two_processes_that_record_the_same_runs_agree_in_sqlite(
    opened, all_rows, make_run, write_at_once, tmp_path: Path
):
    for seed in range(10):
        make_run("bf16", seed, [True, False] * 20)
    runs = finished_runs(tmp_path / "runs")
    write_at_once(str(tmp_path / "new.db"), runs, runs)
    assert len(all_rows(opened(tmp_path / "new.db"))["runs"]) == 10


def test_readers_and_a_writer_work_side_by_side(opened, make_run, tmp_path: Path):
    make_run()
    ledger = opened(tmp_path / "ledger.db")
    with ledger.writing() as writer:
        writer.execute(text("DELETE FROM runs"))
        with opened(tmp_path / "ledger.db").reading() as reader:
            assert reader.execute(select(tables.runs)).all() == []
    with sqlite3.connect(tmp_path / "ledger.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def _at_first_schema(path: Path) -> Ledger:
    """A ledger as the previous schema left it."""
    ledger = open_ledger(path)
    with ledger.writing() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(text(f"DROP TABLE {table.name}"))
        connection.execute(text("DROP TABLE alembic_version"))
        migrate(connection, "0001")
    return ledger


def test_a_ledger_of_the_previous_schema_migrates_and_keeps_its_rows(opened, all_rows, make_run, tmp_path: Path):
    _three_runs(make_run)
    whole = opened(tmp_path / "whole.db")
    record_new(whole, tmp_path / "runs")
    old = _at_first_schema(tmp_path / "old.db")
    with whole.reading() as source, old.writing() as target:
        for name in ("experiments", "runs", "metrics", "evaluations", "evidence", "artefacts"):
            table = tables.metadata.tables[name]
            target.execute(table.insert(), [dict(row) for row in source.execute(select(table)).mappings()])
        assert not target.dialect.has_table(target, "items")
    old.close()

    migrated = opened(tmp_path / "old.db")
    rows = all_rows(migrated)
    assert (len(rows["runs"]), len(rows["metrics"]), rows["items"]) == (3, 18, [])
    assert record_new(migrated, tmp_path / "runs") == 3, "the items of old runs are read from their folders"
    assert all_rows(migrated) == all_rows(whole)


def test_migrations_end_at_the_tables_that_the_code_uses(ledger: Ledger):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    assert newest() == tables.SCHEMA
    with ledger.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []


def test_a_migration_that_fails_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _at_first_schema(tmp_path / "old.db").close()
    monkeypatch.setattr("alembic.op.execute", lambda _: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        open_ledger(tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    assert "items" not in names


def test_a_ledger_of_a_newer_version_is_refused_in_one_line(ledger: Ledger, tmp_path: Path):
    with ledger.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidValueError, match="newer fp4rl"):
        open_ledger(tmp_path / "ledger.db")


@pytest.mark.parametrize("address", ["mysql://x/y", "http://host/ledger"])
def test_an_address_that_is_no_ledger_is_refused(address: str):
    with pytest.raises(InvalidValueError, match="scheme"):
        open_ledger(address)


def test_a_server_that_does_not_answer_is_named_without_its_password():
    pytest.importorskip("psycopg")
    with pytest.raises(NotFoundError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:9/x cannot be used"):
        open_ledger("postgresql://me:secret@127.0.0.1:9/x")


def test_a_step_that_was_judged_twice_is_one_row_as_it_was_judged_last(make_run, opened, tmp_path: Path):
    scores = {"n": 40, "flexible": 0.5, "formatted": 1.0, "mean_length": 20.0, "profile": {"name": "full"}}
    judged = [{"step": 5, "last": last, "strict": strict} | scores for last, strict in ((True, 0.6), (False, 0.5))]
    run = make_run(evaluations=judged, steps_done=5, stopped="an alarm")
    ledger = opened(tmp_path / "ledger.db")
    assert record(ledger, run)
    with ledger.reading() as connection:
        (row,) = connection.execute(select(tables.evaluations)).mappings()
    assert (row["last"], row["strict"]) == (True, 0.6)


def test_a_seed_is_one_repeat_however_many_suites_and_profiles_show_it(make_run, opened, tmp_path: Path):
    scores = {"n": 40, "flexible": 0.5, "formatted": 1.0, "mean_length": 20.0, "step": 30, "last": True}
    ledger = opened(tmp_path / "ledger.db")
    for suite in ("one", "two"):
        for seed, strict in enumerate((0.50, 0.54, 0.47)):
            shown = [
                scores | {"profile": {"name": name}, "strict": strict + extra}
                for name, extra in (("full", 0.1), ("deployment", 0.0), ("w4a16", 0.2))
            ]
            run = make_run("bf16", seed, evaluations=shown, suite=suite)
            record(ledger, run)
    with ledger.reading() as connection:
        groups = repeats(connection, digest(run.spec()["task"]), digest(run.spec()["model"]))
    assert groups == [[0.50, 0.54, 0.47]]
