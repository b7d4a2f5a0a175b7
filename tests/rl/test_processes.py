"""Several processes that train one policy do what one process would: the same batch, the same gradient, one folder."""

import json
import shutil
import subprocess
import sys

import pytest

from fp4rl.cli.main import main
from fp4rl.rl import processes
from fp4rl.rl.components import arguments, require_processes, require_shares
from fp4rl.rl.step_metrics import joined
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.training import Training
from planted.small import SMALL

# Each process takes its share of one fixed batch, in which later answers are longer: a loss that divided by a process's
# own counts would have another gradient. Ends at once, since tearing down a process group now and then aborts.
FIXED_BATCH = """
import json, os, sys, torch
from pathlib import Path
from fp4rl.rl import mismatch, processes, trainer
from fp4rl.rl.events import Evaluated, StepDone
from fp4rl.rl.train import train
from fp4rl.spec.load import load_spec
torch.set_num_threads(1)
out, cache, *specs = map(Path, sys.argv[1:])

def fixed(answers, stand_in, recipe, rows, pad_id, device):
    whole = rows * processes.count()
    chance = torch.Generator().manual_seed(0)
    lengths = torch.arange(whole) % 16 + 1 + torch.arange(whole) // 4
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)).long()
    batch = {
        "completion_ids": torch.randint(5, 40, mask.shape, generator=chance),
        "prompt_ids": torch.randint(5, 40, (whole, 6), generator=chance),
        "prompt_mask": torch.ones(whole, 6, dtype=torch.long),
        "completion_mask": mask,
        "sampling_per_token_logps": torch.zeros(mask.shape),
        "advantages": torch.randn(whole, generator=chance),
    }
    first = processes.rank() * rows
    return {name: value[first : first + rows] for name, value in batch.items()}

trainer.training_batch = fixed
mismatch.require_decoded = lambda *_: None  # nobody sampled this batch
found = {}
for spec in specs:
    judged, steps = [], []
    def hear(event):
        match event:
            case StepDone(_, metrics):
                steps.append(metrics)
            case Evaluated(evaluation):
                judged.append(evaluation.step)
    train(load_spec(str(spec)), out / spec.stem, cache, hear)
    found[spec.stem] = {"judged": judged, "steps": steps}
if processes.is_first():
    out.joinpath("found.json").write_text(json.dumps(found))
processes.wait()
os._exit(0)
"""
LAUNCHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
CASES = {
    "token_mean": ("bf16", {}),
    "sequence_mean": ("bf16", {"loss_agg_mode": "seq-mean-token-mean", "micro_batch_size": 4}),
    "quantized_with_kl_and_teacher": ("w4a16", {"kl_loss_coef": 0.1, "distillation": {"coef": 0.5}}),
}


def called(*words):
    found = subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stderr[-3000:]
    return found


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_one(tmp_path, experiment, model_cache):
    program, specs = tmp_path / "program.py", []
    program.write_text(FIXED_BATCH)
    for name, (arm, changes) in CASES.items():
        training = {"steps": 1, "train_batch_size": 8, "mini_batch_size": 8, "rollout_n": 4, **changes}
        described = experiment(arm, training=training, evaluation={"count": 4, "profiles": ["full"]})
        specs.append(tmp_path / f"{name}.json")
        specs[-1].write_text(json.dumps(described.model_dump(mode="json")))
    called(program, tmp_path / "one", model_cache, *specs)
    called(*LAUNCHER, program, tmp_path / "two", model_cache, *specs)
    one, two = (json.loads((tmp_path / count / "found.json").read_text()) for count in ("one", "two"))
    for name in CASES:
        assert two[name]["judged"] == [0, 1], "each step is judged once"
        (ours,), (theirs,) = one[name]["steps"], two[name]["steps"]
        for metric in ("grad_norm", "policy_loss", *(m for m in ("kl_loss",) if m in ours)):
            assert theirs[metric] == pytest.approx(ours[metric], rel=1e-4), (name, metric)


@pytest.mark.slow
def test_the_first_of_several_processes_looks_at_everything_before_they_begin(tmp_path):
    """Without a warm-up no answer is right: that shows in fake steps alone, which a launched process cannot take."""
    spec = tmp_path / "long.json"
    described = {"model": {"embedded": {"warm_up_steps": 0}}, "training": SMALL["training"] | {"steps": 300}}
    spec.write_text(json.dumps(SMALL | described | {"evaluation": {"count": 8}}))
    command = [sys.executable, "-W", "ignore", *LAUNCHER, "-m", "fp4rl", "run", spec, "--runs", tmp_path / "runs"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 1
    assert ended.stderr.count("preflight, spread: no group differs in 3 steps") == 1
    assert not list((tmp_path / "runs" / "long").glob("*-s0-*"))


@pytest.mark.slow
def test_the_command_trains_with_two_processes_and_goes_on_as_if_never_interrupted(tmp_path, experiment, model_cache):
    described = experiment(
        "w4a16",
        training={"steps": 3, "filter_groups": {"enable": True}, "save_freq": 1, "kl_loss_coef": 0.01},
        injection={"mode": "w4a16", "deployment": "compressed_tensors", "errors": [{"scale": 0.01}]},
        noise={"schedule": {"kind": "constant", "sigma": 0.05}},
        evaluation={"count": 4, "test_freq": 1},
    )
    spec = tmp_path / "both.json"
    spec.write_text(json.dumps(described.model_dump(mode="json")))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "models").symlink_to(model_cache)
    command = [*LAUNCHER, "-m", "fp4rl", "run", spec, "--runs", tmp_path / "runs"]
    called(*command)
    (folder,) = (tmp_path / "runs" / "both").glob("*-s0-*")
    whole = lines(folder)
    assert all(step["sampling/trained_groups"] <= 4 for step in whole)
    assert (folder / "final" / "model.safetensors").is_file()
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    called(*command)
    assert "resumed from the checkpoint after step 2" in (folder / "log.txt").read_text()
    assert lines(folder) == whole
    one = subprocess.run([sys.executable, "-m", "fp4rl", "run", spec, "--runs", tmp_path / "runs"], capture_output=True)
    assert one.returncode == 0  # finished: nothing to do
    (folder / "result.json").unlink()
    one = subprocess.run(
        [sys.executable, "-m", "fp4rl", "run", spec, "--runs", tmp_path / "runs"], capture_output=True, text=True
    )
    assert one.returncode == 2
    assert "was written by 2 processes and this is 1: start as many" in one.stderr


def lines(folder):
    """Metrics without seconds."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in step.items() if not name.startswith("time/")} for step in steps]


def test_extremes_stay_extremes_groups_are_added_and_the_rest_are_means():
    lines = [
        {"response_length/max": 4.0, "is_min": 0.5, "sampling/trained_groups": 3.0, "entropy": 0.2},
        {"response_length/max": 9.0, "is_min": 0.1, "sampling/trained_groups": 5.0, "entropy": 0.4, "kl": 1.0},
    ]
    want = {"response_length/max": 9.0, "sampling/trained_groups": 8.0, "entropy": pytest.approx(0.3), "kl": 1.0}
    assert joined(lines) == want | {"is_min": 0.1}


def test_one_process_is_the_first_and_waits_for_nobody():
    assert (processes.count(), processes.is_first(), processes.from_first(3)) == (1, True, 3)
    assert joined(processes.from_all({"a": 1.0})) == {"a": 1.0}
    processes.wait()


def test_a_batch_is_shared_evenly_or_refused(tmp_path):
    recipe = Training(train_batch_size=16, mini_batch_size=8, rollout_n=8)
    whole, half = (arguments(recipe, tmp_path, 0, count) for count in (1, 2))
    assert (whole["per_device_train_batch_size"], half["per_device_train_batch_size"]) == (64, 32)
    assert whole["steps_per_generation"] == half["steps_per_generation"] == 2
    with pytest.raises(
        InvalidValueError, match=r"3 processes cannot share train_batch_size 16 evenly; .*multiple of 3"
    ):
        require_shares(recipe, 3)
    whole_batch = recipe.model_copy(update={"adv_estimator": "reinforce_plus_plus_baseline"})
    require_shares(whole_batch, 1)
    require_processes(Experiment(), 2)  # torchrun, typed by the user
    with pytest.raises(InvalidValueError, match="under torchrun write --nproc-per-node 2"):
        require_processes(Experiment(processes=2), 4)
    with pytest.raises(InvalidValueError, match="takes its weights from one process, and this run has 2"):
        require_processes(Experiment(rollout={"engine": "vllm"}), 2)
    with pytest.raises(InvalidValueError, match="take grpo or rloo"):
        require_shares(whole_batch, 2)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"processes": 3}, "training: 3 processes cannot share train_batch_size 16 evenly; take a multiple of 3"),
        (
            {"processes": 4, "training": {"mini_batch_size": 1, "rollout_n": 6}},
            "training: 4 processes cannot share the 6 answers of one update (mini_batch_size 1 x rollout_n 6) evenly",
        ),
        (
            {"processes": 2, "training": {"mini_batch_size": 2, "rollout_n": 6, "micro_batch_size": 4}},
            "training: micro_batch_size 4 does not divide the 6 answers of an update that each process has",
        ),
        ({"processes": 2, "training": {"adv_estimator": "reinforce_plus_plus_baseline"}}, "take grpo or rloo"),
        ({"processes": 2, "rollout": {"engine": "vllm"}}, "rollout.engine vllm gets its weights from one process"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_what_processes_cannot_share_is_one_line_before_any_starts(verb, keys, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fp4rl.engines.executors.processes.LocalPool.__call__", lambda *_: pytest.fail("it started"))
    spec = tmp_path / "own.json"
    spec.write_text(json.dumps({**keys, "training": {"train_batch_size": 16, **keys.get("training", {})}}))
    assert main([verb, str(spec), *(["--runs", str(tmp_path / "runs")] if verb == "run" else [])]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
