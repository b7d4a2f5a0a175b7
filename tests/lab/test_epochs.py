"""Epochs are steps: of whole batches of the problems that are really there."""

import json

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab.epochs import in_steps, steps_of
from fp4rl.lab.matrix import planned, single
from fp4rl.rl.check import check
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite


def described(**training):
    """As many problems as GSM8K has for training; the documents tell of 58 steps an epoch of 128, and 29 of 256."""
    return {"task": {"name": "arithmetic", "train_count": 7473}, "training": {"mini_batch_size": 32, **training}}


@pytest.mark.parametrize(("batch", "epochs", "steps"), [(128, 1, 58), (128, 3, 174), (256, 1, 29), (256, 2, 58)])
def test_the_steps_are_those_of_the_documents(batch, epochs, steps):
    experiment = Experiment.model_validate(described(train_batch_size=batch, epochs=epochs))
    assert steps_of(experiment) == steps
    in_so_many = in_steps(experiment)
    direct = Experiment.model_validate(described(train_batch_size=batch, steps=steps))
    assert single(in_so_many, "s").run_id == single(direct, "s").run_id


def test_each_arm_of_a_suite_gets_its_own_and_the_suite_keeps_no_epochs():
    base = described(train_batch_size=128, epochs=2)
    suite = Suite.model_validate(
        {"suite": "s", "seeds": [0], "base": base, "arms": {"a": {}, "b": {"training.train_batch_size": 256}}}
    )
    resolved = in_steps(suite)
    assert {run.arm: run.experiment.training.steps for run in planned(resolved)} == {"a": 116, "b": 58}
    assert "epochs" not in yaml.safe_dump(resolved.model_dump(mode="json"))


def test_a_description_without_epochs_stays_the_same_object():
    experiment, suite = Experiment(), Suite.model_validate({"suite": "s", "arms": {"a": {}}})
    assert in_steps(experiment) is experiment
    assert in_steps(suite) is suite


def test_what_cannot_be_counted_is_one_line_with_the_cure(tmp_path, capsys):
    few = Experiment.model_validate(described(train_batch_size=8192, epochs=1, mini_batch_size=8192))
    with pytest.raises(InvalidValueError, match=r"7473 problems are less than one batch .* write training.steps"):
        in_steps(few)
    axes = {"suite": "s", "base": described(epochs=1), "arms": {"a": {}}, "axes": {"training.lr": [1e-6]}}
    with pytest.raises(InvalidValueError, match="make arms of them"):
        in_steps(Suite.model_validate(axes))
    with pytest.raises(InvalidValueError, match=r"training\.epochs"):
        check(Experiment.model_validate({"training": {"epochs": 1}}))
    gone = described(epochs=1, train_batch_size=64) | {"task": {"name": "gsm8k", "path": str(tmp_path / "gone.jsonl")}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(gone))
    assert main(["plan", str(tmp_path / "mine.yaml")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_an_override_of_the_catalogue_counts_in_epochs(capsys):
    assert main(["plan", "catalogue/quickstart", "training.epochs=1", "task.train_count=160", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12
    assert main(["plan", "catalogue/quickstart", "training.steps=10", "task.train_count=160", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
