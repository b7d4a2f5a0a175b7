"""`fp4rl verl-config` on a command line: what it prints and writes, and its one-line errors."""

import json

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.models.tokenizer import build_tokenizer

OLD = """python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo trainer.total_training_steps=9 \\
    trainer.hw_error_injection.enabled=True trainer.hw_error_injection.error_type=mxfp4 \\
    'trainer.hw_error_injection.target_modules=["linear"]' trainer.hw_error_injection.injection_point=both \\
    actor_rollout_ref.rollout.n=4 actor_rollout_ref.model.path=/models/m
"""


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """`said(words)` -> exit code, output, errors of `fp4rl verl-config words`, in a folder with a suite."""
    build_tokenizer().save_pretrained(tmp_path / "model")
    training = {"train_batch_size": 8, "mini_batch_size": 4, "rollout_n": 4, "steps": 3}
    base = {"model": {"path": "model"}, "training": training, "evaluation": {"count": 4}}
    suite = {"suite": "mine", "seeds": [3, 4], "base": base, "arms": {"plain": {}, "w4a16": {"injection": "w4a16"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    (tmp_path / "old.sh").write_text(OLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        code = main(["verl-config", *words])
        return code, *capsys.readouterr()

    return run


def test_json_holds_all_that_verl_is_asked_for(said):
    code, out, _ = said("mine.yaml", "training.lr=2e-6", "--arm", "w4a16", "--seed", "4", "--npu", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["arm"], found["seed"], found["machine"], found["files"]) == ("w4a16", 4, "npu", [])
    assert found["configuration"]["actor_rollout_ref.actor.optim.lr"] == 2e-6
    assert found["configuration"]["trainer.device"] == "npu"
    assert "actor_rollout_ref.actor.optim.lr=2e-06" in found["overrides"]
    assert found["environment"] == {"VLLM_ASCEND_ENABLE_NZ": "0"}
    assert found["differences"]


def test_the_script_goes_to_stdout_and_what_differs_to_stderr(said, tmp_path):
    before = set(tmp_path.iterdir())
    code, out, err = said("mine.yaml", "--arm", "plain")
    assert code == 0
    assert out.startswith("#!/usr/bin/env bash\n")
    assert "trainer.n_gpus_per_node=8" in out
    assert "in verl: evaluation.profiles" in err
    assert max(map(len, err.splitlines())) <= 80
    assert set(tmp_path.iterdir()) == before


def test_out_writes_the_script_with_its_data_and_experiment(said, tmp_path):
    code, out, _ = said("mine.yaml", "--arm", "w4a16", "--cpu", "--out", "run.sh")
    assert code == 0
    for ending in ("sh", "train.parquet", "val.parquet", "spec.yaml"):
        assert (tmp_path / f"run.{ending}").is_file()
        assert f"run.{ending}" in out
    assert yaml.safe_load((tmp_path / "run.spec.yaml").read_text())["engine"] == "verl"


def test_a_script_of_verl_is_printed_as_a_description(said, tmp_path):
    code, out, err = said("--from", "old.sh")
    found = yaml.safe_load(out)
    assert code == 0
    assert found["injection"]["mode"] == "w4a4"
    assert found["training"]["steps"] == 9
    assert "warning: apply_during: both" in err
    assert said("--from", "old.sh", "--out", "new.yaml")[0] == 0
    assert main(["plan", "new.yaml", "model.path=model"]) == 0


def test_a_translated_script_as_json(said):
    found = json.loads(said("--from", "old.sh", "--json")[1])
    assert set(found) == {"spec", "warnings"}
    assert found["spec"]["model"]["path"] == "/models/m"


@pytest.mark.parametrize(
    ("words", "code", "cure"),
    [
        (("mine.yaml",), 2, "name --arm: plain, w4a16"),
        (("mine.yaml", "--arm", "w4a17"), 2, "did you mean 'w4a16'"),
        (("mine.yaml", "--arm", "plain", "--seed", "9"), 2, "seeds=[9]"),
        (("mine.yaml", "--arm", "plain", "--gpu", "--npu"), 2, "take one"),
        (("mine.yaml", "training.lr_scheduler=linear", "--arm", "plain"), 2, "constant and cosine"),
        (("mine.yaml", "--arm", "plain", "--devices", "3"), 2, "do not divide over 3 devices"),
        (("mine.yaml", "model.path=gone", "--arm", "plain", "--out", "x.sh"), 2, "does not exist"),
        (("mine.yaml", "--arm", "plain", "--out", "gone/x.sh"), 2, "there is no folder"),
        ((), 2, "--from a script"),
        (("mine.yaml", "--from", "old.sh"), 2, "drop the others"),
        (("--from", "none.sh"), 2, "none.sh: no such file or folder; name one that is there"),
        (("--from", "gone.sh"), 2, "gone.sh"),
        (("--from", "mine.yaml"), 2, "no setting of verl"),
    ],
)
def test_errors_are_one_line_with_a_cure(said, words, code, cure):
    found, out, err = said(*words)
    last = err.strip().splitlines()[-1]
    assert (found, out) == (code, "")
    assert last.startswith("fp4rl: ")
    assert cure in last
