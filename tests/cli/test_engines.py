"""What `fp4rl run` does with runs of another engine, and without TRL."""

import pytest
import yaml

from fp4rl.cli.main import main as fp4rl
from fp4rl.lab.matrix import single
from fp4rl.lab.work import execute_run
from fp4rl.rl.train import train
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment

TINY = {
    "model": {"embedded": {"warm_up_steps": 2}},
    "training": {"algorithm": "grpo", "steps": 1, "train_batch_size": 2, "rollout_n": 4, "mini_batch_size": 2},
    "evaluation": {"count": 2, "profiles": ["full"]},
}
SUITE = {"suite": "two", "seeds": [0], "base": TINY, "arms": {"own": {}, "other": {"engine": "verl"}}}


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(SUITE))
    return str(tmp_path / "two.yaml"), str(tmp_path / "runs")


def test_runs_of_another_engine_are_named_and_left_to_it(suite, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr("fp4rl.cli.run.run_all", lambda runs, *_: planned.extend(runs) or _nothing())
    file, runs = suite
    assert fp4rl(["run", file, "--runs", runs]) == 0
    assert [run.arm for run in planned] == ["own"]
    said = " ".join(capsys.readouterr().err.split())
    assert "to be trained by verl; `fp4rl verl-config` writes its scripts, `fp4rl runs import` takes each in" in said
    assert "other-s0-" in said


def _nothing():
    from fp4rl.lab.runner import SuiteOutcome

    return SuiteOutcome()


def test_without_trl_training_names_the_extra_before_anything_starts(suite, monkeypatch, capsys, tmp_path):
    from importlib.util import find_spec

    monkeypatch.setattr("fp4rl.lab.runner.find_spec", lambda name: None if name == "trl" else find_spec(name))
    file, runs = suite
    assert fp4rl(["run", file, "--runs", runs]) == 2
    assert "training needs TRL, the extra `train`: pip install 'fp4rl[train]'" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "two").exists()


DOORS = {
    "train": lambda experiment, folder: train(experiment, folder, folder),
    "execute_run": lambda experiment, folder: execute_run(single(experiment, "alone"), folder),
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_trains_an_experiment_of_another_engine(door, tmp_path):
    with pytest.raises(InvalidValueError, match="engine verl trains in processes of its own"):
        DOORS[door](Experiment(engine="verl"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_default_engine_is_not_written_so_that_ids_stay():
    assert "engine" not in Experiment().model_dump()
    assert Experiment(engine="verl").model_dump()["engine"] == "verl"
