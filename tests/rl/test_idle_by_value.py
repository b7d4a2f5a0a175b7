"""Settings that are said to do nothing do nothing: two runs, with and without, end in the same bits."""

import sys
import types

import pytest

from fp4rl.spec.idle import idle
from fp4rl.spec.load import merge

CASES = {
    "training.kl_loss_type": ({}, {"training": {"kl_loss_type": "k2"}}),
    "training.norm_adv_by_std": (
        {"training": {"adv_estimator": "rloo"}},
        {"training": {"norm_adv_by_std": False}},
    ),
    "training.clip_ratio_high": ({"training": {"mini_batch_size": 4}}, {"training": {"clip_ratio_high": 0.001}}),
    "training.overlong_buffer.len": (
        {"training": {"overlong_buffer": {"enable": False}}},
        {"training": {"overlong_buffer": {"len": 30}}},
    ),
    "training.filter_groups.metric": ({}, {"training": {"filter_groups": {"metric": "reward"}}}),
    "training.rollout_correction.threshold": ({}, {"training": {"rollout_correction": {"threshold": 1.0001}}}),
    "training.reference_precision": (
        {"training": {"kl_loss_coef": 0.1}},
        {"training": {"reference_precision": "deployment"}},
    ),
    "injection.seed": ({"injection": {"mode": "w4a4"}}, {"injection": {"seed": 5}}),
    "injection.fused_groups": ({"injection": {"mode": "w4a4"}}, {"injection": {"fused_groups": "free"}}),
    "injection.apply_during.kv_cache": (
        {"injection": {"mode": "w4a4"}},
        {"injection": {"apply_during": {"kv_cache": ["rollout"]}}},
    ),
    "noise.targets.qk_norms": (
        {"noise": {"schedule": {"kind": "constant", "sigma": 0.05}}},
        {"noise": {"targets": {"qk_norms": True}}},
    ),
    "evaluation.temperature": ({}, {"evaluation": {"temperature": 0.2}}),
}


@pytest.fixture
def learnt(run, experiment, monkeypatch):
    """Train under a reward that has spread; the digests of the final weights and of all answers."""
    module = types.ModuleType("rewards_of_length")
    module.of_length = lambda completion, **_: float(len(completion) % 5)
    monkeypatch.setitem(sys.modules, "rewards_of_length", module)
    usual = {"training": {"reward": "rewards_of_length.of_length", "steps": 2}, "evaluation": {"count": 8}}

    def digests(content, name):
        trained, heard = run(experiment("bf16", **merge(usual, content)), name)
        assert trained.evidence.weights_changed > 0.5
        return trained.evidence.final_weights, [one.summary().answers_digest for one in heard.evaluations]

    return digests


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES)
def test_an_idle_setting_changes_no_bit(key, learnt, experiment):
    """Kind: a knob wired to nothing; the registry is held to what two runs end in."""
    base, change = CASES[key]
    assert key in idle(experiment("bf16", **merge(base, change)))
    assert learnt(base, "without") == learnt(merge(base, change), "with")


def test_a_setting_that_acts_changes_the_digests(learnt):
    assert learnt({}, "without")[0] != learnt({"training": {"lr": 3e-4}}, "with")[0]
