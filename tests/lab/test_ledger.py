"""The ledger: the same rows however often and in whatever order runs are recorded, and nothing lost between writers."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select, text

from fp4rl.lab.folders import RunFolder, finished_runs
from fp4rl.lab.ledger import tables
from fp4rl.lab.ledger.query import about, find_run, repeats, runs_of
from fp4rl.lab.ledger.record import rebuild, record, record_new
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
        record(ledger, run, {})
    before = all_rows(ledger)
    assert rebuild(ledger, tmp_path / "runs") == 3
    assert all_rows(ledger) == before
    fresh = opened(tmp_path / "fresh.db")
    rebuild(fresh, tmp_path / "runs")
    assert all_rows(fresh) == before
    assert {name: len(rows) for name, rows in before.items()} == {
        "ledger_schema": 1,
        "runs": 3,
        "evaluations": 6,
        "documents": 3,
    }


def test_a_row_that_no_folder_explains_does_not_survive_a_rebuild(all_rows, make_run, ledger: Ledger, tmp_path: Path):
    runs = _three_runs(make_run)
    record_new(ledger, tmp_path / "runs")
    before = all_rows(ledger)
    with ledger.writing() as connection:
        number = tables.run_number(runs[0].suite, runs[0].run_id)
        made_up = {"run": number, "step": 99, "profile": "made-up", "last": False, "conditions": {}}
        connection.execute(tables.evaluations.insert().values(made_up))
    assert all_rows(ledger) != before
    rebuild(ledger, tmp_path / "runs")
    assert all_rows(ledger) == before


def test_recording_twice_changes_nothing(all_rows, make_run, ledger: Ledger, tmp_path: Path):
    make_run()
    assert record_new(ledger, tmp_path / "runs") == 1
    before = all_rows(ledger)
    assert record_new(ledger, tmp_path / "runs") == 0
    assert all_rows(ledger) == before


def test_a_run_whose_result_changed_is_replaced_as_a_whole(make_run, ledger: Ledger):
    run = make_run(strict=[True] * 40)
    record(ledger, run, {})
    result = run.result().as_json() | {"wall_s": 99.0, "evaluations": []}
    (run.path / "result.json").write_text(json.dumps(result))
    assert record_new(ledger, run.path.parents[1]) == 1
    with ledger.reading() as connection:
        number = tables.run_number(run.suite, run.run_id)
        assert runs_of(connection, [number])[number].result.wall_s == 99.0
        assert connection.execute(select(tables.evaluations)).all() == []


def test_an_unfinished_run_is_not_recorded(make_run, ledger: Ledger, tmp_path: Path):
    run = make_run()
    (run.path / "result.json").unlink()
    with pytest.raises(NotFoundError, match="not finished"):
        record(ledger, run, {})
    assert record_new(ledger, tmp_path / "runs") == 0


def test_a_record_that_fails_halfway_leaves_nothing(
    all_rows, make_run, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
):
    run = make_run()
    unfit = {"run": 1, "step": None, "profile": "full", "last": True, "conditions": {}}
    monkeypatch.setattr("fp4rl.lab.ledger.tables._evaluation_rows", lambda _: [unfit])
    with pytest.raises(Exception, match="NOT NULL"):
        record(ledger, run, {})
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


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    """A ledger that schema 0002 left: two runs of `trial` and an imported log, all without their folders."""
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(Path(__file__).with_name("ledger_0002.sql").read_text())
    return path


def test_a_ledger_of_the_previous_schema_keeps_every_run_without_a_folder(opened, all_rows, old_file: Path):
    ledger = opened(old_file)
    assert {name: len(rows) for name, rows in all_rows(ledger).items()} == {
        "ledger_schema": 1,
        "runs": 3,
        "evaluations": 6,
        "documents": 3,
    }
    with ledger.reading() as connection:
        shown = [about(connection, ledger.root, name).as_dict() for name in ("imported/verl", "trial/bf16-s0")]
        row = find_run(connection, "trial/bf16-s0")
        groups = repeats(connection, row["task"], row["model"])
    foreign, own = shown
    assert (foreign["run"]["imported"]["status"], foreign["run"]["seed"]) == ("failed", 3)
    assert foreign["metrics"]["loss"] == {"count": 2, "first": 0.5, "last": 0.25, "lowest": 0.25, "highest": 0.5}
    assert own["evidence_lines"] == {"master": 1, "live_equals_fresh": 1}
    assert (own["metrics"]["grad_norm"]["last"], len(own["artefacts"])) == (None, 6)
    assert groups == [[0.5, 1.0]]


def test_a_ledger_of_the_previous_schema_is_completed_from_the_folders(
    opened, all_rows, make_run, old_file: Path, tmp_path: Path
):
    make_run("bf16", 0, [True, False] * 4)
    make_run("bf16", 1, [True] * 8)
    ledger = opened(old_file)
    assert record_new(ledger, tmp_path / "runs") == 2
    assert rebuild(ledger, tmp_path / "runs", drop_missing=True) == 2
    whole = opened(tmp_path / "whole.db")
    record_new(whole, tmp_path / "runs")
    assert all_rows(ledger) == all_rows(whole)


def test_an_old_record_that_cannot_be_read_names_its_run_and_leaves_the_ledger(old_file: Path):
    with contextlib.closing(sqlite3.connect(old_file)) as connection, connection:
        connection.execute("UPDATE evaluations SET strict = NULL WHERE step = 30")
    with pytest.raises(InvalidValueError, match=r"trial/bf16-s\d\S* .*strict.*fp4rl ledger rebuild"):
        open_ledger(old_file)
    with contextlib.closing(sqlite3.connect(old_file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0002",)]
        assert connection.execute("SELECT count(*) FROM evaluations").fetchall() == [(6,)]


def test_a_change_of_schema_that_fails_leaves_the_old_one(old_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fp4rl.lab.ledger.store.write", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        open_ledger(old_file)
    with contextlib.closing(sqlite3.connect(old_file)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0002",)]
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (3,)


@pytest.mark.parametrize("statement", ["UPDATE ledger_schema SET version = '9999'", "DROP TABLE ledger_schema"])
def test_a_ledger_of_a_newer_version_is_refused_in_one_line(ledger: Ledger, tmp_path: Path, statement: str):
    with ledger.writing() as connection:
        connection.execute(text(statement))
        if "DROP" in statement:
            connection.execute(text("CREATE TABLE alembic_version AS SELECT '9999' AS version_num"))
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
    assert record(ledger, run, {})
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
            record(ledger, run, {})
    with ledger.reading() as connection:
        groups = repeats(connection, digest(run.spec()["task"]), digest(run.spec()["model"]))
    assert groups == [[0.50, 0.54, 0.47]]


def test_runs_that_were_rounded_differently_under_one_profile_are_no_repeats(make_run, opened, tmp_path: Path):
    """As where a mode means other formats than it did when the first seeds were run."""
    ledger = opened(tmp_path / "ledger.db")
    for seed, (table, strict) in enumerate((("once", 0.50), ("now", 0.80), ("once", 0.52), ("now", 0.83))):
        run = make_run("bf16", seed, strict, profile={"name": "nvfp4_w4a4", "sites_digest": table})
        record(ledger, run, {})
    with ledger.reading() as connection:
        groups = repeats(connection, digest(run.spec()["task"]), digest(run.spec()["model"]))
    assert sorted(groups) == [[0.50, 0.52], [0.80, 0.83]]
