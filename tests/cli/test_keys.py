"""`fp4rl keys` knows every key that an experiment takes, and no other."""

import json

import pytest

from fp4rl.cli.main import main
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.points import MODES


@pytest.fixture
def keys(capsys):
    def run(*arguments):
        assert main(["keys", *arguments, "--json"]) == 0
        return {row["key"]: row for row in json.loads(capsys.readouterr().out)}

    return run


def leaves(content, above=""):
    for name, value in content.items():
        yield f"{above}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")


def test_every_key_of_a_full_experiment_is_listed(keys):
    full = Experiment.model_validate(
        {"noise": {}, "model": {"embedded": {}, "lora": {}}, "training": {"distillation": {}}, "health": {}}
    )
    own = {name for name in leaves(full.model_dump(mode="json")) if not name.startswith("health.policies.")}
    assert own <= set(keys())


def test_a_default_is_what_an_empty_experiment_has(keys):
    empty = Experiment(model={"path": "models/real"})  # the embedded model has its own
    for name, row in keys("training").items():
        *parts, last = name.split(".")
        holder = empty
        for part in parts:
            holder = getattr(holder, part, None)
        # A part that is off by default (distillation, ema) or a list of parts (rewards) has no value of its own there.
        if hasattr(holder, last) and not row["type"].startswith("keys"):
            value = getattr(holder, last)
            assert row["default"] == (list(value) if isinstance(value, tuple) else value), name


def test_members_of_a_union_are_one_key_with_all_their_types(keys):
    found = keys("task")
    assert found["task.name"]["type"] == "arithmetic | gsm8k | table"
    assert found["task.path"]["required"]


def test_the_keys_of_a_suite_are_listed_and_a_margin_says_its_unit(keys):
    assert {"suite", "base", "arms", "axes", "seeds", "comparisons.factors"} <= set(keys()) & set(keys("suite"))
    assert "0.01 is one point" in keys("comparisons")["comparisons.margin"]["meaning"]
    assert "training.steps" not in keys("suite")


def test_the_base_of_a_suite_has_the_keys_of_an_experiment(keys):
    assert keys("base.training.distillation") == keys("training.distillation")


def test_a_mode_is_told_by_the_modes_there_are_and_factors_of_layers_as_a_mapping(keys):
    assert all(mode in keys("injection.mode")["injection.mode"]["meaning"] for mode in MODES)
    assert keys("injection.weight")["injection.weight"]["type"] == "format | none"
    by_layer = keys("noise.multipliers.by_layer")["noise.multipliers.by_layer"]
    assert (by_layer["type"], by_layer["default"]) == ("layer: number", {})


def test_a_word_that_is_near_to_no_key_gets_a_short_answer(capsys):
    assert main(["keys", "xyzzy"]) == 2
    err = capsys.readouterr().err
    assert "training" in err
    assert len(err) < 240


def test_an_unknown_part_names_the_nearest(capsys):
    assert main(["keys", "trainin"]) == 2
    assert "did you mean 'training'" in capsys.readouterr().err


def test_nothing_is_wider_than_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["keys", "noise"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
