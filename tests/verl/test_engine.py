"""Two FSDP2 ranks of verl's engine: what its streams hold, by value, against a rounding that is not fp4rl's."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl")

import oracle
import tiny

PROGRAM = Path(__file__).with_name("engine_program.py")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
W4A8 = {"mode": "w4a8", "apply_during": {"input": ["training"]}}
NOISE = {"schedule": {"kind": "linear", "sigma_start": 0.05, "sigma_end": 0.02}}
SIGMAS = [0.05, 0.04, 0.03]  # a line over 4 steps
MATRICES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
MATRICES |= {"gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
WEIGHTS = 2 * sum(a * b for a, b in MATRICES.values())
ALL = WEIGHTS + 2 * 320 * 64 + 2 * (2 * 64 + 2 * 16) + 64  # embedding, head, and the norms: two and q, k a layer


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    tiny.model(folder / "model")
    spec = tiny.experiment(folder, injection=W4A8, noise=NOISE, training={"steps": 4})
    port = 29700 + os.getpid() % 200
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "FP4RL_VERL_SPEC": str(spec),
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]),
    }
    launcher = [*("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"), str(port)]
    for kind in ("full", "lora", "offload"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, str(PROGRAM), str(folder), kind],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def found(folder, kind):
    return json.loads((folder / f"{kind}.json").read_text())


def step_of(folder, kind, step):
    saved = torch.load(folder / f"{kind}-{step}.pt")
    return saved["masters"], saved["sent"]


def is_norm(name):
    return "norm" in name


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("kind", ["full", "offload"])
def test_rollouts_get_every_matrix_as_its_bfloat16_master_rounds_and_the_rest_as_it_is(ran, kind, step):
    masters, sent = step_of(ran, kind, step)
    assert sent.keys() == masters.keys()
    assert {value.dtype for value in sent.values()} == {torch.bfloat16}
    for name, value in sent.items():
        if any(f"{layer}.weight" in name for layer in LINEAR):
            assert torch.equal(value, oracle.mxfp4(masters[name])), name
            assert not torch.equal(value, masters[name]), name
        elif not is_norm(name):
            assert torch.equal(value, masters[name]), name


@pytest.mark.parametrize("step", range(3))
def test_noise_is_of_the_scheduled_size_on_clean_weights_and_never_adds_up(ran, step):
    masters, sent = step_of(ran, "full", step)
    named = [n for n in sent if is_norm(n) and "q_norm" not in n and "k_norm" not in n]
    assert len(named) == 5
    change = torch.cat([(sent[n].float() - masters[n].float()).flatten() for n in named])
    assert len(change) == 320
    # 320 draws: the standard deviation is known to 1 / sqrt(640) of itself; BF16 steps of 2^-7 near 1 add little
    assert change.std().item() == pytest.approx(SIGMAS[step], rel=0.16)
    assert abs(change.mean().item()) < 4 * SIGMAS[step] / 320**0.5
    assert all(torch.equal(sent[n], masters[n]) for n in sent if "q_norm" in n or "k_norm" in n)
    assert found(ran, "full")[step]["sigma"] == pytest.approx(SIGMAS[step])


@pytest.mark.parametrize("kind", ["full", "lora", "offload"])
def test_the_masters_are_bit_for_bit_what_they_were_before_a_stream(ran, kind):
    assert [each["unchanged"] for each in found(ran, kind)[:3]] == [True] * 3
    weights = [step_of(ran, kind, step)[0] for step in range(3)]
    trained = [name for name in weights[0] if kind != "lora" or "lora_" in name]
    assert all(any(not torch.equal(a[n], b[n]) for n in trained) for a, b in pairwise(weights))


def test_a_stream_that_is_broken_off_gives_the_masters_back(ran):
    assert found(ran, "full")[-1]["half read"]


def test_a_resumed_engine_streams_the_same_weights_with_the_noise_of_the_same_step(ran):
    assert found(ran, "full")[-1]["resumed"] == [3, True]


def test_every_layer_is_rounded_in_training_and_in_the_stream(ran):
    for at, each in enumerate(found(ran, "full")[:3]):
        assert (each["sites"], each["trainable"], each["compared"]) == (14, ALL, 14)
        assert each["counts"]["rollout/weight"] == WEIGHTS
        if at:  # forward, and again in the backward, since activations are recomputed
            assert each["counts"]["training/weight"] == 2 * WEIGHTS
            assert each["counts"]["training/input"] > 0


def test_merged_adapters_are_trained_as_before_and_added_unrounded_to_the_rounded_base(ran):
    trained = 4 * 2 * sum(a + b for a, b in MATRICES.values())
    assert [each["trainable"] for each in found(ran, "lora")[:3]] == [trained] * 3
    assert [each["adapted"] for each in found(ran, "lora")[:3]] == [[]] * 3
    masters, sent = step_of(ran, "lora", 2)
    assert not any("lora" in name for name in sent)
    for name, value in sent.items():
        if not any(f"{layer}.weight" in name for layer in LINEAR):
            continue
        at = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = masters[f"{at}.lora_A.default.weight"], masters[f"{at}.lora_B.default.weight"]
        assert b.abs().max() > 0
        wanted = oracle.mxfp4(masters[f"{at}.base_layer.weight"]) + (b @ a * 2.0).to(torch.bfloat16)
        assert torch.equal(value, wanted), name


def test_adapters_are_switched_off_for_the_reference(ran):
    assert found(ran, "lora")[-1] == {"without adapters": "reference", "with them": "training"}


def test_the_shards_are_the_parts_of_the_whole_stream_and_nothing_has_changed_since(ran):
    last = found(ran, "full")[-1]
    assert last["shards"]
    assert last["deltas"] == 0


def test_the_reference_is_injected_and_rounds_nothing_in_its_own_phase(ran):
    last = found(ran, "full")[-1]
    assert (last["reference"], last["rounded in the reference"]) == ("reference", {})
