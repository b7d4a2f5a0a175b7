"""FP4RL_BACKEND is read at the doors, forces a backend, and a compilation is told where somebody waits for it."""

import json
from types import SimpleNamespace

import pytest

from fp4rl.cli.main import main
from fp4rl.engines.executors import processes
from fp4rl.lab.runner import Outcome
from fp4rl.numerics import dispatch, native_build

LOAD, BUILD = native_build.load, native_build.build


@pytest.fixture
def fresh(monkeypatch):
    """A process that has chosen nothing yet and finds no built kernels."""
    monkeypatch.setattr(dispatch, "_PROCESS", dispatch._Process())
    monkeypatch.setattr(native_build, "load", lambda: None)
    monkeypatch.setattr("fp4rl.numerics.errors.SHAPE", (32, 64))


def test_the_word_in_the_environment_is_what_rounds(fresh, monkeypatch, capsys):
    monkeypatch.setenv("FP4RL_BACKEND", "reference")
    monkeypatch.setattr(native_build, "build", lambda: pytest.fail("built although another backend is forced"))
    monkeypatch.setattr(dispatch, "BUILD_AFTER", 1)
    assert main(["formats", "--compare", "--json"]) == 0
    assert dispatch._PROCESS.chosen == "reference"
    assert json.loads(capsys.readouterr().out)


def test_a_word_that_is_no_backend_is_one_line_with_the_cure(fresh, monkeypatch, capsys):
    monkeypatch.setenv("FP4RL_BACKEND", "nativ")
    assert main(["formats", "--compare"]) == 2
    said = capsys.readouterr()
    assert said.err.strip() == "fp4rl: FP4RL_BACKEND: no backend is called 'nativ'; did you mean 'native'?"
    assert not said.out


def test_what_is_being_compiled_is_told_on_standard_error(fresh, monkeypatch, capsys):
    if native_build.compiler() is None:
        pytest.skip("no C compiler here")
    monkeypatch.delenv("FP4RL_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "BUILD_AFTER", 1)
    monkeypatch.setattr(native_build, "build", lambda: LOAD() or BUILD())
    assert main(["formats", "--compare", "--json"]) == 0
    said = capsys.readouterr()
    assert "compiling the rounding kernels, once on this machine" in said.err
    assert "compiled the rounding kernels in" in said.err
    assert dispatch._PROCESS.library is not None
    assert json.loads(said.out)


def test_a_worker_tells_its_run_what_it_compiles_and_heeds_the_word(fresh, monkeypatch, tmp_path):
    heard = []
    run = SimpleNamespace(run_id="a-0", suite="s")
    pipe = SimpleNamespace(send=heard.append)
    monkeypatch.setattr("fp4rl.lab.work.execute_run", lambda *_: dispatch._PROCESS.announce("compiling"))
    monkeypatch.setenv("FP4RL_BACKEND", "chunked")
    assert processes.attempt(run, tmp_path, (), pipe.send) == Outcome(run)
    assert dispatch._PROCESS.chosen == "chunked"
    assert [(event.run_id, event.stage) for event in heard] == [("a-0", "compiling")]
    monkeypatch.setenv("FP4RL_BACKEND", "chunkt")
    ended = processes.attempt(run, tmp_path, (), pipe.send)
    assert "FP4RL_BACKEND: no backend is called 'chunkt'" in ended.error
    assert ended.mistake
