"""Two processes, DDP and FSDP2, whole weights and adapters, train what one process trains; planted faults are found."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("replayed.py")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LORA = {"embedded": {"warm_up_steps": 60}, "lora": {"rank": 4, "alpha": 8.0}}
HALF = {"embedded": {"warm_up_steps": 60}, "dtype": "bfloat16"}
BACK = {"rules": ["rollback if response_length/mean > 1 at step 2"], "max_rollbacks": 1}
CASES = {
    "full": ("w4a16", {}, {}),
    "lora": ("w4a16", {"model": LORA}, {}),
    "noise_and_reference": ("w4a16+aqn", {}, {"kl_loss_coef": 0.1, "micro_batch_size": 4}),
    "lora_and_reference": ("w4a16", {"model": LORA}, {"kl_loss_coef": 0.1}),
    "recomputed": ("bf16", {}, {"gradient_checkpointing": True, "loss_agg_mode": "seq-mean-token-mean"}),
    "masters": ("w4a16", {"model": HALF}, {"micro_batch_size": 4}),
    "clamped": ("w4a16", {}, {"learned_clipping": {"init": 1.0, "lr": 0.1}, "micro_batch_size": 4}),
    "rolled_back": ("w4a16+aqn", {"health": BACK}, {"steps": 3, "save_freq": 1}),
    "rolled_back_masters": ("w4a16", {"model": HALF, "health": BACK}, {"steps": 3, "save_freq": 1}),
}
KINDS = {"ddp": {"processes": 2}, "fsdp2": {"processes": 2, "sharding": "fsdp2"}}
PAIRS = [(kind, name) for kind in KINDS for name in CASES if (kind, name) != ("fsdp2", "clamped")]  # which is refused
FAULTS = {
    "ddp__own_gradients": "gradients are not averaged over the processes: in process 1",
    "fsdp2__own_gradients": "gradients are not averaged over the processes: in process 1",
    "ddp__no_injection": "differ between the processes",
    "fsdp2__no_injection": "differ between the processes",
    "ddp__other_weights": "the weights differ between the processes",
    "ddp__other_dtype": "differ between the processes",
    "fsdp2__other_dtype": "differ between the processes",
}
NOT_A_NUMBER = {"policies": {"not_a_number": "rollback"}}
SAMPLED = {  # faults in sampled runs of both kinds
    "needs_more": ("w4a16", {}, {"steps": 2, "filter_groups": {"enable": True, "max_num_gen_batches": 6}}),
    "not_a_number": ("w4a16+aqn", {"health": NOT_A_NUMBER}, {"steps": 3, "save_freq": 1}),
    "not_judged": (
        "w4a16",
        {"health": NOT_A_NUMBER, "evaluation": {"count": 4, "profiles": ["full"], "test_freq": 1}},
        {"steps": 3, "save_freq": 1},
    ),
}
ALONE = {  # found by the process in which they are, which ends the others
    "stale_copy": ("w4a16", r"process 1: .*model\.layers\.1\.mlp\.down_proj"),
    "noise_twice": ("w4a16+aqn", r"process 1: .*decod"),
}


def called(*words, code=0):
    words = [sys.executable, "-W", "ignore", *map(str, words)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert found.returncode == code, found.stderr[-3000:]
    return found.stderr


def described(experiment, file, arm, changes, training):
    """Write an experiment as a file."""
    training = {"steps": 2, "train_batch_size": 8, "mini_batch_size": 8, "rollout_n": 4, **training}
    changes = {"evaluation": {"count": 4, "profiles": ["full"]}, **changes}
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(experiment(arm, training=training, **changes).model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def ran(tmp_path_factory, experiment, model_cache):
    """Everything, by one process and by two: folder, and what was found by name."""
    place, specs = tmp_path_factory.mktemp("replayed"), {"one": [], "two": []}

    def written(of, name, arm, changes, training):
        specs[of].append(described(experiment, place / of / f"{name}.json", arm, changes, training))

    for name, (arm, changes, training) in CASES.items():
        written("one", name, arm, changes, training)
    for kind, name in PAIRS:
        arm, changes, training = CASES[name]
        written("two", f"{kind}_{name}", arm, {**changes, **KINDS[kind]}, training)
    for fault in FAULTS:
        half = {"model": HALF} if fault.endswith("dtype") else {}
        written("two", fault, "w4a16", {**KINDS[fault.partition("__")[0]], **half}, {})
    for of, launcher in (("one", ()), ("two", LAUNCHER)):
        called(*launcher, PROGRAM, place / of, model_cache, *specs[of])
    return place, {of: json.loads((place / of / "found.json").read_text()) for of in specs}


def far(found, wanted):
    """The relative distance of two sets of tensors."""
    assert found.keys() == wanted.keys()
    wrong = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return (wrong / sum(float(tensor.double().square().sum()) for tensor in wanted.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), PAIRS)
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
    assert [step["step"] for step in two["steps"]] == ([1, 2, 2] if "rolled_back" in name else [1, 2])
    assert (two["back"], two["stopped"] is None) == (([[2, 1]], False) if "rolled_back" in name else ([], True))
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


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, experiment, model_cache):
    """Runs on what was sampled, by two processes: what was found by name."""
    place, specs = tmp_path_factory.mktemp("sampled"), []
    for fault, (arm, changes, training) in SAMPLED.items():
        for kind, keys in KINDS.items():
            file = place / f"{kind}__{fault}.json"
            specs.append(described(experiment, file, arm, {**changes, **keys}, training))
    called(*LAUNCHER, PROGRAM, place, model_cache, *specs)
    return json.loads((place / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_must_sample_more_often_than_the_other_keeps_nobody_waiting(sampled, kind):
    found = sampled[f"{kind}__needs_more"]
    assert (found["trace"], found["error"]) == (None, None)
    assert [step["sampling/gen_batches"] for step in found["steps"]] == [2.0, 2.0]  # 1 and 3 generations
    assert [step["sampling/trained_groups"] for step in found["steps"]] == [8.0, 8.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["not_a_number", "not_judged"])
def test_nan_that_one_process_finds_takes_all_of_them_back(sampled, kind, fault):
    found = sampled[f"{kind}__{fault}"]
    assert (found["trace"], found["error"], found["stopped"]) == (None, None, None)
    assert found["back"] == ([[1, 1]] if fault == "not_a_number" else [[1, 0]])
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ALONE)
def test_what_one_sharded_process_computes_otherwise_ends_the_run(fault, experiment, model_cache, tmp_path):
    arm, said = ALONE[fault]
    spec = described(experiment, tmp_path / f"fsdp2__{fault}.json", arm, KINDS["fsdp2"], {})
    assert re.search(said, called(*LAUNCHER, PROGRAM, tmp_path, model_cache, spec, code=1))
