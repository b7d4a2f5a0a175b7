"""One damaged old run is named and left out; every other run is read, the damaged folder is not touched.

Kind: a file of a finished run that is truncated, emptied, mixed up, unreadable or of another shape.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.cli.run import _record, carry_out_all
from fp4rl.cli.terminal import console
from fp4rl.lab.files import Damaged
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.ledger import query, store
from fp4rl.lab.ledger.query import Filter, count_runs
from fp4rl.lab.ledger.record import rebuild, record_new
from fp4rl.lab.matrix import planned
from fp4rl.rl import checkpoints
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import load_spec
from planted.records import line

FILES = ("sites.json", "spec.yaml", "result.json", "evidence.jsonl", "metrics.jsonl", "items/30-deployment.parquet")
VERBS = (
    ("runs",),
    ("show", "good/bf16-s0"),
    ("compare", "good/w4a16@deployment", "good/bf16@deployment", "--factor", "injection", "--force"),
    ("ledger", "rebuild"),
    ("ledger", "info"),
)


@pytest.fixture
def lab(make_run, tmp_path, monkeypatch):
    """Two good arms and, in another suite, the run that a test damages; the test stands beside `runs`."""
    for seed in (0, 1):
        make_run("bf16", seed, [True, False], suite="good")
        make_run("w4a16", seed, [True, True], suite="good", spec={"injection": {"weight": "mxfp4"}})
    monkeypatch.chdir(tmp_path)
    return make_run("old", 0, [True, False], suite="old")


def content_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cut(file: Path) -> None:
    """In the middle; a line of a JSONL file that is not its last one."""
    content = file.read_bytes()
    at = content.find(b"\n") // 2 if file.suffix == ".jsonl" else len(content) // 2
    file.write_bytes(content[:at] + (content[content.find(b"\n") :] if file.suffix == ".jsonl" else b""))


@pytest.mark.parametrize(("name", "verbs"), [("sites.json", VERBS), *((name, VERBS[:1]) for name in FILES[1:])])
def test_every_verb_names_a_damaged_run_shows_the_others_and_ends_with_one(lab, name, verbs, capsys):
    cut(lab.path / name)
    before = content_of(lab.path)
    for verb in verbs:
        (lab.path.parents[1] / "ledger.db").unlink(missing_ok=True)
        code = main([*verb])
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert code == 1, (verb, err)
        assert lines[0].startswith("left out: "), err
        assert str(lab.path.name) in lines[0]
        assert lines[1:] == ["fp4rl: 1 run is damaged and left out, as named above"], err
        assert out, "the others are shown"
    assert content_of(lab.path) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", "[]"),
        ("result.json", "null"),
        ("result.json", '{"evaluations": 3}'),
        ("result.json", '{"evaluations": [{"strict": 0.5}]}'),
        ("result.json", '{"seed": {"a": 1}}'),
        ("result.json", '{"seed": 99999999999999999999999}'),
        ("result.json", "[" * 100_000),
        ("sites.json", "[1]"),
        ("sites.json", '{"digest": ["a"]}'),
        ("spec.yaml", "- a"),
        ("spec.yaml", "a: &a [*a]"),
        ("spec.yaml", "[" * 100_000),
        ("evidence.jsonl", "3\n"),
        ("evidence.jsonl", '{"phase": 1}\n'),
        ("metrics.jsonl", '{"step": "x"}\n'),
        ("metrics.jsonl", '{"loss": 1}\n'),
        ("metrics.jsonl", "\xff\n"),
    ],
)
def test_a_file_of_another_shape_is_damage_too(lab, opened, tmp_path, name, content):
    (lab.path / name).write_text(content, encoding="latin-1")
    ledger, named = opened(tmp_path / "ledger.db"), []
    assert record_new(ledger, tmp_path / "runs", on_damaged=named.append) == 4
    assert len(named) == 1
    assert lab.path.name in str(named[0])
    assert "\n" not in str(named[0])


def test_without_a_listener_the_others_are_recorded_and_then_it_is_raised(lab, opened, tmp_path):
    cut(lab.path / "sites.json")
    ledger = opened(tmp_path / "ledger.db")
    with pytest.raises(Damaged, match=r"sites\.json is damaged"):
        record_new(ledger, tmp_path / "runs")
    assert record_new(ledger, tmp_path / "runs", on_damaged=lambda _: None) == 0
    with pytest.raises(Damaged):
        rebuild(ledger, tmp_path / "runs", drop_missing=True)


def test_a_run_of_another_suite_is_not_stopped(lab, tmp_path, monkeypatch, capsys):
    """The run itself is played by copying a finished one: what matters is what is recorded after it."""
    from fp4rl.engines.executors import processes
    from fp4rl.lab.matrix import single
    from fp4rl.lab.runner import Outcome

    cut(lab.path / "sites.json")
    run = single(Experiment(), "mine")

    def carried(self, runs, root, on_event):
        for one in runs:
            shutil.copytree(next((root / "good").glob("bf16-s0*")), root / one.suite / one.run_id)
            yield Outcome(one)

    monkeypatch.setattr(processes.LocalPool, "__call__", carried)
    outcome = carry_out_all(Experiment(), "mine", tmp_path / "runs", 1)
    assert [one.run_id for one in outcome.done] == [run.run_id]
    assert capsys.readouterr().err.count("left out: ") == 1


def test_run_and_report_use_the_ledger_that_the_environment_names(lab, tmp_path, monkeypatch, capsys):
    """The kind: a variable that some verbs heed and others pass by. `w4a4` has one run; its spread is the ledger's."""
    from fp4rl.engines.executors import processes

    def carried(self, runs, root, on_event):
        yield from ()

    places = []
    monkeypatch.setattr(query, "known_spread", lambda place, *_: places.append(place))
    monkeypatch.setattr(processes.LocalPool, "__call__", carried)
    monkeypatch.setenv("FP4RL_LEDGER", str(tmp_path / "team.db"))
    (tmp_path / "mine.yaml").write_text("training: {steps: 1}\n")
    assert main(["run", str(tmp_path / "mine.yaml")]) == 0
    with store.open_ledger(tmp_path / "team.db") as ledger, ledger.reading() as connection:
        assert count_runs(connection, Filter()) == 5
    assert not (tmp_path / "runs" / "ledger.db").exists()
    sides = {"treatment": "w4a4@deployment", "control": "bf16@deployment", "question": "?"}
    (tmp_path / "runs" / "mine" / "suite.yaml").write_text(
        yaml.safe_dump({"suite": "mine", "arms": {"bf16": {}, "w4a4": {"injection": "w4a4"}}, "comparisons": [sides]})
    )
    plan = planned(load_spec(tmp_path / "runs" / "mine" / "suite.yaml"))
    for run in (run for run in plan if run.seed == 0):
        folder = tmp_path / "runs" / "mine" / run.run_id
        shutil.copytree(next((tmp_path / "runs" / "good").glob("bf16-s0*")), folder)
        (folder / "spec.yaml").write_text(run.experiment.model_dump_json())
        (folder / "result.json").write_text(json.dumps(RunFolder(folder).result().as_json() | {"spec_digest": None}))
    main(["report", "mine"])
    assert places == [str(tmp_path / "team.db")]
    capsys.readouterr()


def test_a_locked_ledger_is_one_line_and_stops_no_run(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "_WAIT_S", 0.2)
    assert main(["runs"]) == 0
    capsys.readouterr()
    (lab.path / "result.json").write_text(
        json.dumps(lab.result().as_json() | {"wall_s": 1.0})
    )  # so that there is work to do
    with sqlite3.connect(tmp_path / "runs" / "ledger.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert main(["runs"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "ledger.db is locked: another process writes to it" in err
        other.execute("ROLLBACK")


def test_a_ledger_that_is_locked_whole_stops_no_run(lab, tmp_path, monkeypatch, capsys):
    """Nobody may even read it: the runs are made all the same, and entered by whoever opens it next."""
    monkeypatch.setattr(store, "_WAIT_S", 0.2)
    assert main(["runs"]) == 0
    capsys.readouterr()
    with sqlite3.connect(tmp_path / "runs" / "ledger.db", isolation_level=None) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert main(["show", "good/bf16-s0"]) == 2
        assert "ledger.db is locked: another process writes to it" in capsys.readouterr().err
        _record(tmp_path / "runs" / "ledger.db", tmp_path / "runs", console(stderr=True))
        assert capsys.readouterr().err.startswith("warning: the ledger ")
    other.close()


def test_a_damaged_ledger_is_one_line_in_the_middle_of_a_verb_too(lab, tmp_path, capsys):
    assert main(["runs"]) == 0
    file = tmp_path / "runs" / "ledger.db"
    content = bytearray(file.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    file.write_bytes(content)
    for leftover in file.parent.glob("ledger.db-*"):
        leftover.unlink()
    capsys.readouterr()
    assert main(["show", "good/bf16-s0"]) == 2
    assert "`fp4rl ledger rebuild` makes a new one" in capsys.readouterr().err


def test_rebuild_makes_no_folder_of_a_typo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--runs", "rnus"], ["--runs", "rnus", "--ledger", "l.db"], ["--ledger", "no/l.db"]):
        assert main(["ledger", "rebuild", *arguments]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    assert main(["ledger", "rebuild", "--ledger", "no/l.db"]) == 2
    assert "no: no such folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only mount needs root")
@pytest.mark.parametrize("with_ledger", [False, True])
def test_an_archive_that_cannot_be_written_is_read(lab, tmp_path, with_ledger):
    if with_ledger:
        assert main(["runs"]) == 0
    program = (
        "from fp4rl.cli.main import main\n"
        "for verb in (['runs'], ['show', 'good/bf16-s0'], ['compare', 'good/w4a16', 'good/bf16', '--factor', "
        "'injection', '--force'], ['ledger', 'info']):\n    assert main(verb) == 0, verb\n"
    )
    mount = "mount --bind runs runs && mount -o remount,ro,bind runs runs"
    found = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'({mount}) 2>/dev/null || exit 77; {sys.executable} -c "$0"', program],
        capture_output=True,
        text=True,
    )
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("no mounts can be made here")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert "mxfp4" in found.stdout or "bf16" in found.stdout


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoints" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    checkpoints.complete(folder, 3, "code", {"positions": [[3, 1]], "by": {10: 1, 9: (2,)}, "rollbacks": 0})
    return folder


def test_a_whole_checkpoint_is_taken(checkpoint):
    found = checkpoints.newest(checkpoint.parent, "code", pytest.fail)
    assert found.step == 3
    assert found.state["positions"] == [[3, 1]]
    assert checkpoints.all_of(checkpoint.parent) == {3: checkpoint}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"stamp": "code"}',
        lambda text: text.replace("[[3, 1]]", "[[3, 2]]"),  # can be read, and would go on elsewhere
        lambda text: text.replace('"files": {', '"files": [').replace("}", "]"),
    ],
    ids=range(8),
)
def test_a_checkpoint_whose_own_json_is_damaged_is_left_out(checkpoint, damage):
    file = checkpoint / checkpoints.STATE
    file.write_text(damage(file.read_text()))
    said = []
    assert checkpoints.newest(checkpoint.parent, "code", said.append) is None
    assert len(said) == 1
    assert "\n" not in said[0]
    checkpoints.all_of(checkpoint.parent)


def test_a_resume_over_a_damaged_log_is_refused_and_changes_nothing(tmp_path):
    run = RunFolder(tmp_path / "s" / "a")
    run.add_evidence(line("checkpoint", step=2))
    run.add_metrics(1, {"loss": 1.0})
    for file in ("evidence.jsonl", "metrics.jsonl"):
        (run.path / file).write_text('{"kin\n' + (run.path / file).read_text())
    before = content_of(run.path)
    with pytest.raises(Damaged, match=r"evidence\.jsonl is damaged"):
        run.drop_evidence_after(2)
    with pytest.raises(Damaged, match=r"metrics\.jsonl is damaged"):
        run.drop_metrics_after(1)
    assert content_of(run.path) == before


def test_what_was_left_out_of_one_command_line_does_not_end_the_next(lab, capsys):
    cut(lab.path / "sites.json")
    assert main(["runs"]) == 1
    shutil.rmtree(lab.path)
    assert main(["runs"]) == 0
