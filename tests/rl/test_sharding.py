"""Two processes, DDP and FSDP2, whole weights and adapters, train what one process trains; planted faults are found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("replayed.py")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LORA = {"embedded": {"warm_up_steps": 60}, "lora": {"rank": 4, "alpha": 8.0}}
HALF = {"embedded": {"warm_up_steps": 60}, "dtype": "bfloat16"}
CASES = {
    "full": ("w4a16", {}, {}),
    "lora": ("w4a16", {"model": LORA}, {}),
    "noise_and_reference": ("w4a16+aqn", {}, {"kl_loss_coef": 0.1, "micro_batch_size": 4}),
    "lora_and_reference": ("w4a16", {"model": LORA}, {"kl_loss_coef": 0.1}),
    "recomputed": ("bf16", {}, {"gradient_checkpointing": True, "loss_agg_mode": "seq-mean-token-mean"}),
    "masters": ("w4a16", {"model": HALF}, {"micro_batch_size": 4}),
}
KINDS = {"ddp": {"processes": 2}, "fsdp2": {"processes": 2, "sharding": "fsdp2"}}
FAULTS = {
    "ddp__own_gradients": "gradients are not averaged over the processes: in process 1",
    "fsdp2__own_gradients": "gradients are not averaged over the processes: in process 1",
    "ddp__no_injection": "differ between the processes",
    "fsdp2__no_injection": "differ between the processes",
    "ddp__other_weights": "the weights differ between the processes",
}


def called(*words):
    found = subprocess.run([sys.executable, "-W", "ignore", *map(str, words)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, experiment, model_cache):
    """Everything, by one process and by two: folder, and what was found by name."""
    place, specs = tmp_path_factory.mktemp("replayed"), {"one": [], "two": []}

    def written(of, name, arm, changes, training):
        training = {"steps": 2, "train_batch_size": 8, "mini_batch_size": 8, "rollout_n": 4, **training}
        described = experiment(arm, training=training, evaluation={"count": 4, "profiles": ["full"]}, **changes)
        file = place / of / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(described.model_dump(mode="json")))
        specs[of].append(file)

    for name, (arm, changes, training) in CASES.items():
        written("one", name, arm, changes, training)
        for kind, keys in KINDS.items():
            written("two", f"{kind}_{name}", arm, {**changes, **keys}, training)
    for fault in FAULTS:
        written("two", fault, "w4a16", KINDS[fault.partition("__")[0]], {})
    for of, launcher in (("one", ()), ("two", LAUNCHER)):
        called(*launcher, PROGRAM, place / of, model_cache, *specs[of])
    return place, {of: json.loads((place / of / "found.json").read_text()) for of in specs}


def far(found, wanted):
    """The relative distance of two sets of tensors."""
    assert found.keys() == wanted.keys()
    wrong = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (wrong / sum(float(tensor.double().square().sum()) for tensor in wanted.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answers_give_the_losses_gradients_and_weights_of_one_process(ran, kind, name):
    place, found = ran
    one, two = found["one"][name], found["two"][f"{kind}_{name}"]
    assert (one["error"], two["trace"], two["error"]) == (None, None, None)
    coarse = "masters" in name
    for ours, theirs in zip(one["steps"], two["steps"], strict=True):
        for metric in ("grad_norm", "policy_loss", *(m for m in ("kl_loss",) if m in ours)):
            assert theirs[metric] == pytest.approx(ours[metric], rel=3e-2 if coarse else 1e-4, abs=1e-6), metric
    gradients = (
        load_file(place / of / f"{stem}.grads.safetensors") for of, stem in (("two", f"{kind}_{name}"), ("one", name))
    )
    assert far(*gradients) < (2e-2 if coarse else 1e-4)
    file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
    ours, theirs = (
        load_file(place / of / stem / "final" / file) for of, stem in (("one", name), ("two", f"{kind}_{name}"))
    )
    assert far(theirs, ours) < (2e-3 if coarse else 1e-5)
    assert two["evidence"]["live_equals_fresh"] is True
    if one["evidence"]["sites"]:
        of_each = two["evidence"]["calls_by_process"]
        assert two["evidence"]["calls"] == {phase: sum(each[phase] for each in of_each) for phase in of_each[0]}
        assert all(each["training"] for each in of_each)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """What each of two processes found, by case."""
    out = tmp_path_factory.mktemp("streams") / "found.json"
    called(*LAUNCHER, Path(__file__).with_name("streamed.py"), out)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_weight_stream_of_sharded_models_is_that_of_one_process_tensor_by_tensor(streams):
    for found in streams:
        assert len(found) == 10
        for name, case in found.items():
            assert "error" not in case, (name, case)
            assert case["names"], name
            assert case["differ"] == case["differ_whole"] == [], name
            assert 0.3 < case["share"] < 0.7, "each process holds its part"


@pytest.mark.slow
def test_rounded_copies_that_are_older_than_their_weights_are_found_in_a_sharded_rollout(streams):
    assert all(case["refresh_found"] for found in streams for case in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_trains_another_policy_is_found(ran, fault):
    _, found = ran
    assert FAULTS[fault] in (found["two"][fault]["error"] or "nothing was found")
