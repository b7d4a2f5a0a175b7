"""A description runs on verl unchanged: `fp4rl verl-config` writes a script, a shell runs it, and the values are there.

Two FSDP2 ranks and two steps of verl's `main_ppo`: fp4rl's own prompts, data and reward, the KL to a reference,
importance weights, rounded weights with noise, and old settings that say the same as the experiment.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")

import tiny
import yaml

from fp4rl.cli.main import main
from fp4rl.spec.load import load_spec
from fp4rl.spec.records import ENGINE_METRICS, ENGINE_RUN

TRAINING = {
    "algorithm": "grpo",
    "steps": 2,
    "train_batch_size": 4,
    "mini_batch_size": 2,
    "rollout_n": 2,
    "lr": 1e-3,
    "max_prompt_length": 160,
    "max_response_length": 8,
    "overlong_buffer": {"enable": True, "len": 4},
    "kl_loss_coef": 0.01,
    "rollout_correction": {"rollout_is": "token"},
}
ARM = {
    "injection": {"mode": "w4a16"},
    "noise": {"schedule": {"kind": "linear", "sigma_start": 0.02, "sigma_end": 0.01}},
}
OLD = "++trainer.hw_error_injection."
AROUND = (  # of this machine alone
    *("+ray_kwargs.ray_init.include_dashboard=False", "+ray_kwargs.ray_init.object_store_memory=200000000"),
    *("data.dataloader_num_workers=0", f"{OLD}enabled=True", f"{OLD}error_type=mxfp4", f"{OLD}injection_point=weight"),
    *(f"{OLD}target_modules=[linear]", f"{OLD}seed=0"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run by the script: run.sh with its files, log.txt, run.run."""
    here = tmp_path_factory.mktemp("run")
    tiny.model(here / "model")
    model = {"path": str(here / "model"), "dtype": "bfloat16"}
    evaluation = {"count": 3, "max_new_tokens": 8}
    base = {"engine": "verl", "model": model, "task": {"name": "arithmetic", "difficulty": 1}, "training": TRAINING}
    suite = {"suite": "mine", "seeds": [7], "base": base | {"evaluation": evaluation}, "arms": {"w4a16": ARM}}
    (here / "mine.yaml").write_text(yaml.safe_dump(suite))
    assert main(["verl-config", str(here / "mine.yaml"), "--cpu", "--out", str(here / "run.sh")]) == 0
    variables = {
        "PYTHON": sys.executable,
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with (here / "log.txt").open("w") as log:
        command = ["bash", str(here / "run.sh"), *AROUND]
        done = subprocess.run(command, cwd=here, env=os.environ | variables, stdout=log, stderr=log, timeout=900)
    assert done.returncode == 0, (here / "log.txt").read_text(errors="replace")[-3000:]
    return here


def test_the_run_is_finished_under_the_experiment_that_was_written(folder):
    record = json.loads((folder / "run.run" / ENGINE_RUN).read_text())
    assert record["spec"] == json.loads(load_spec(folder / "run.spec.yaml").model_dump_json())
    assert (record["steps_done"], record["steps_asked"], record["seed"]) == (2, 2, 7)
    assert (folder / "run.run/global_step_2/actor/huggingface/config.json").is_file()


def test_verl_counts_what_the_experiment_asked_for(folder):
    steps = [json.loads(line) for line in (folder / "run.run" / ENGINE_METRICS).read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["fp4rl/elements/training/weight"] > 0
        assert step["actor/lr"] == 1e-3
        assert step["actor/kl_coef"] == 0.01
        assert 0.5 < step["rollout_corr/rollout_is_mean"] < 2
        assert -1 <= step["critic/score/mean"] <= 1  # the reward of fp4rl, 0 or 1, less the overlong punishment
    assert steps[-1]["val-core/arithmetic/acc/mean@1"] >= 0


def test_old_settings_are_read_and_their_traps_are_told(folder):
    log = (folder / "log.txt").read_text(errors="replace")
    assert "fp4rl: warning: hooks swapped weights" in log
    assert "fp4rl: 14 sites on each of 2 ranks" in log
