"""Whatever became of an old run's files, every verb reads the other runs, tells in one line, and changes nothing."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.cli.main import main
from planted.damage import FEW, damages, hashes, inflict

pytestmark = pytest.mark.fuzz


def told(arguments) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    lines = err.getvalue().splitlines()
    assert code in (0, 1, 2), err.getvalue()
    assert all(line.startswith(("fp4rl: ", "left out: ")) for line in lines), lines
    assert bool(lines) == (code != 0), (code, lines)
    return code, out.getvalue()


@pytest.fixture
def lab(make_run, tmp_path, monkeypatch):
    for seed in (0, 1):
        make_run("bf16", seed, [True, False], suite="good")
        make_run("w4a16", seed, [True, True], suite="good", spec={"injection": {"weight": "mxfp4"}})
    run = make_run("old", 0, [True, False], suite="old")
    shutil.copytree(run.path, tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    return run.path


def good_runs(runs: Path) -> list[str]:
    _, out = told(["runs", "--suite", "good", "--json", "--runs", str(runs)])
    return json.loads(out)


def test_verbs_over_a_damaged_run(lab, tmp_path):
    runs = tmp_path / "runs"
    before = good_runs(runs)
    good = hashes(runs / "good")

    @FEW
    @given(st.data())
    def verbs(data):
        shutil.rmtree(lab)
        shutil.copytree(tmp_path / "whole", lab)
        for name, what in data.draw(damages(lab)):
            inflict(lab, name, what)
        left = hashes(lab)
        assert told(["ledger", "rebuild", "--drop-missing"])[0] in (0, 1)
        assert good_runs(runs) == before
        told(["show", f"old/{lab.name}"])
        assert told(["show", "good/bf16-s0"])[0] in (0, 1)
        told(["compare", "old/old@deployment", "good/bf16@deployment", "--force"])
        assert hashes(lab) == left
        assert hashes(runs / "good") == good

    verbs()
