"""How an experiment reaches the processes of a verl run."""

import pytest

from fp4rl.engines.verl.settings import TRAINER_MODE, experiment, overrides
from fp4rl.spec.errors import InvalidValueError, NotFoundError


def test_without_the_variable_a_process_is_under_no_experiment(monkeypatch):
    monkeypatch.delenv("FP4RL_VERL_SPEC", raising=False)
    assert experiment() is None


def test_the_overrides_name_the_trainer_and_carry_the_file_to_every_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("injection: w4a16\nseed: 3\n")
    mode, variable = overrides("run.yaml")
    assert mode == f"trainer.v1.trainer_mode={TRAINER_MODE}"
    key, _, path = variable.partition("=")
    assert key == "+ray_kwargs.ray_init.runtime_env.env_vars.FP4RL_VERL_SPEC"
    monkeypatch.setenv("FP4RL_VERL_SPEC", path)
    monkeypatch.chdir("/")
    spec = experiment()
    assert spec is not None
    assert (spec.seed, spec.injection.weight.name) == (3, "mxfp4")


def test_a_missing_file_and_a_suite_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("FP4RL_VERL_SPEC", str(tmp_path / "gone.yaml"))
    with pytest.raises(NotFoundError, match=r"gone\.yaml: no such file"):
        experiment()
    (tmp_path / "gone.yaml").write_text("suite: s\narms: {a: {}}\n")
    with pytest.raises(InvalidValueError, match="holds a suite; `fp4rl verl-config` writes one arm and seed"):
        experiment()
