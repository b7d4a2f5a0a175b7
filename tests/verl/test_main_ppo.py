"""Two steps of verl's own `main_ppo` on two ranks, under an experiment: rollouts judged by value, log and record read.

Every rollout server keeps each set of weights that it got: before step 1, after steps 1 and 2, for the validation, and
after it.
"""

import json
import re

import pytest

pytest.importorskip("verl")

import launched
import oracle
import tiny
import torch

from fp4rl.cli.main import main
from fp4rl.lab.foreign.reader import read_steps
from fp4rl.spec.evidence import Injected, MasterCheck, RolloutNoise, Rounded
from fp4rl.spec.records import read_engine_run, read_result

INJECTION = {"mode": "w4a8", "apply_during": {"input": ["training"]}}
NOISE = {"schedule": {"kind": "linear", "sigma_start": 0.05, "sigma_end": 0.01}}  # over 2 steps: 0.05, 0.01
MATRIX = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
NOISY = re.compile(r"(input_layernorm|post_attention_layernorm|^model\.norm)\.weight$")
WEIGHTS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)


def held(run, server, load):
    return torch.load(run.folder / "held" / f"held-{server}-{load}.pt")


def metrics(run):
    """Return step -> metrics, as verl's console shows them."""
    return read_steps(run.folder / "log.txt")[1].in_order()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    spec = tiny.experiment(folder, injection=INJECTION, noise=NOISE)
    return launched.main_ppo(folder, "trainer.test_freq=2", spec=spec)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    model = {"path": str(folder / "model"), "dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}}
    spec = tiny.experiment(folder, injection=INJECTION, model=model)
    return launched.main_ppo(folder, spec=spec)


def test_both_runs_end_well(full, lora):
    assert full.code == 0, full.log[-6000:]
    assert lora.code == 0, lora.log[-6000:]


@pytest.mark.parametrize("load", range(1, 6))
def test_both_servers_multiply_by_rounded_matrices_after_every_sync(full, load):
    one, other = held(full, 0, load), held(full, 1, load)
    assert all(torch.equal(one[name], other[name]) for name in one)
    matrices = [name for name in one if MATRIX.search(name)]
    assert len(matrices) == 14
    assert all(torch.equal(one[name], oracle.mxfp4(one[name])) for name in matrices)
    rest = [name for name in one if "embed" in name or "lm_head" in name]
    assert not any(torch.equal(one[name], oracle.mxfp4(one[name])) for name in rest)


def test_the_first_sync_has_the_rounding_of_the_models_file(full):
    from safetensors.torch import load_file

    start, sent = load_file(full.folder / "model" / "model.safetensors"), held(full, 0, 1)
    for name in (name for name in start if not NOISY.search(name)):
        wanted = oracle.mxfp4(start[name]) if MATRIX.search(name) else start[name]
        assert torch.equal(sent[name], wanted), name


def test_noise_follows_its_schedule_is_off_in_validation_and_does_not_add_up(full):
    first, last, validation, after = (held(full, 0, load) for load in (1, 3, 4, 5))
    names = [name for name in first if NOISY.search(name)]
    assert len(names) == 5

    def spread(noisy, clean):
        return torch.cat([(noisy[n].float() - clean[n].float()) for n in names]).square().mean().sqrt().item()

    ones = {name: torch.ones(64) for name in names}  # the norms of an untrained model
    assert spread(first, ones) == pytest.approx(0.05, rel=0.16)  # 320 draws
    assert spread(last, validation) == pytest.approx(0.01, rel=0.2)
    assert all(torch.equal(last[name], after[name]) for name in last)
    untouched = [name for name in last if name not in names]
    assert all(torch.equal(last[name], validation[name]) for name in untouched)
    by_step = metrics(full)
    assert [by_step[step]["fp4rl/noise/sigma"] for step in (1, 2)] == pytest.approx([0.05, 0.01])
    assert by_step[1]["fp4rl/noise/realised"] == pytest.approx(0.05, rel=0.16)
    assert by_step[2]["fp4rl/noise/realised"] == pytest.approx(0.01, rel=0.2)


def test_counters_and_health_stand_in_verls_own_log(full):
    by_step = metrics(full)
    assert sorted(by_step) == [1, 2]
    for step, own in by_step.items():
        assert (own["fp4rl/sites"], own["fp4rl/ranks"]) == (14, 2)
        assert (own["fp4rl/stream/step"], own["fp4rl/stream/sites"], own["fp4rl/stream/compared"]) == (step - 1, 14, 14)
        assert own["fp4rl/stream/elements"] == WEIGHTS
        # two ranks, each with whole weights in every forward: old log-probabilities, two updates, and recomputing
        assert own["fp4rl/elements/training/weight"] % (2 * WEIGHTS) == 0
        assert own["fp4rl/elements/training/weight"] >= 2 * 3 * WEIGHTS
        assert own["fp4rl/elements/training/input"] > 0
        assert (own["fp4rl/health/state"], own["fp4rl/health/alarms"]) == (1, 0)  # a watch, which the log explains:
        assert 0 < own["actor/grad_norm"] < 1e3
    assert "fp4rl: step 1: dead_rollouts watch: 100% of the answers are cut off" in full.log
    assert "fp4rl: 14 sites on each of 2 ranks" in full.log


def test_the_record_holds_the_evidence_of_the_whole_run(full):
    run = read_engine_run(json.loads((full.left / "fp4rl_run.json").read_text()))
    assert (run.engine, run.steps_asked, run.steps_done, run.versions["verl"]) == ("verl", 2, 2, "0.9.1")
    assert (run.summary.sites, run.summary.processes, run.summary.noise.rollouts) == (14, 2, 4)
    lines = run.lines
    assert all(line.unchanged for line in lines if isinstance(line, MasterCheck))
    assert {(line.phase, line.sites) for line in lines if isinstance(line, Rounded)} == {
        ("rollout", 14),
        ("evaluation", 14),
    }
    assert [line.step for line in lines if isinstance(line, RolloutNoise)] == [0, 1, 2, 2]
    injected = {(line.phase, line.point) for line in lines if isinstance(line, Injected)}
    assert injected >= {("training", "weight"), ("training", "input"), ("rollout", "weight"), ("evaluation", "weight")}
    assert run.summary.final_weights is not None


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_finished_run_is_a_run_of_the_ledger_whose_weights_are_those_that_were_trained(kind, request, tmp_path):
    run, model = request.getfixturevalue(kind), []
    if kind == "lora":  # verl's own tool joins adapters
        launched.merged(run.left / "global_step_2" / "actor", tmp_path / "merged")
        model = ["--model", str(tmp_path / "merged" / "lora_adapter")]
    main(["runs", "import", str(run.left), "--suite", "tiny", "--arm", kind, "--runs", str(tmp_path), *model])
    [folder] = (tmp_path / "tiny").glob(f"{kind}-s7-*")
    result = read_result(json.loads((folder / "result.json").read_text()))
    assert (result.steps_done, result.seed, result.versions["verl"]) == (2, 7, "0.9.1")
    assert {(each.step, each.profile.name) for each in result.evaluations} == {
        (step, profile) for step in (0, 2) for profile in ("full", "w4a16")
    }
    assert result.evidence.final_weights is not None


def test_adapters_are_what_is_trained_and_reach_the_rollouts_unrounded(lora):
    by_step = metrics(lora)
    assert [own["fp4rl/trainable"] for own in by_step.values()] == [7424] * 2
    assert [own["fp4rl/sites"] for own in by_step.values()] == [14] * 2
    first, last = held(lora, 0, 1), held(lora, 0, 3)
    for name in first:
        if not MATRIX.search(name):
            assert torch.equal(first[name], last[name]), name
            continue
        assert torch.equal(first[name], oracle.mxfp4(first[name]))  # a fresh adapter adds nothing
        assert not torch.equal(last[name], oracle.mxfp4(last[name]))
        added = torch.linalg.svdvals(last[name].float() - first[name].float())
        # of rank 4; what stands beyond it is the rounding of the sum to bfloat16
        assert added[4] < 0.2 * added[0]
