"""The registry of settings that cannot act: each is named where it cannot, and not where it can."""

import inspect
import re

import pytest

from fp4rl.spec import idle as module
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.idle import idle, rules, value_at
from fp4rl.spec.load import merge

BATCH = {"train_batch_size": 4, "mini_batch_size": 4}
SR = {"name": "mxfp4", "rounding": "stochastic"}
SERVER = {"engine": "vllm", "server": "http://127.0.0.1:8000", "max_model_len": 64}
CASES = [  # a key, where it cannot act, and one change more after which it can
    (
        "training.kl_loss_type",
        {"training": {"kl_loss_type": "k2"}},
        {"training": {"kl_loss_coef": 0.1}},
    ),
    (
        "training.reference_precision",
        {"training": {"reference_precision": "deployment", "kl_loss_coef": 0.1}},
        {"injection": "w4a16"},
    ),
    (
        "training.norm_adv_by_std",
        {"training": {"adv_estimator": "rloo", "norm_adv_by_std": False}},
        {"training": {"adv_estimator": "grpo"}},
    ),
    (
        "training.clip_ratio_high",
        {"training": {"clip_ratio_high": 0.4} | BATCH},
        {"training": {"mini_batch_size": 2}},
    ),
    ("training.clip_ratio_low", {"training": {"clip_ratio_low": 0.4} | BATCH}, {"noise": {"logprobs": "noisy"}}),
    (
        "training.overlong_buffer.len",
        {"training": {"overlong_buffer": {"enable": False, "len": 9}}},
        {"training": {"overlong_buffer": {"enable": True}}},
    ),
    (
        "training.filter_groups.max_num_gen_batches",
        {"training": {"filter_groups": {"enable": False, "max_num_gen_batches": 9}}},
        {"training": {"filter_groups": {"enable": True}}},
    ),
    (
        "injection.smooth.cap",
        {"injection": {"mode": "w4a4", "smooth": {"cap": 2.0}}},
        {"injection": {"straight_through": "smooth"}},
    ),
    (
        "injection.schedule.input",
        {"injection": {"mode": "w4a4", "schedule": {"input": {"from_step": 0}}}},
        {"injection": {"schedule": {"input": {"over": 1}}}},
    ),
    ("training.save_total_limit", {"training": {"save_total_limit": 5}}, {"training": {"save_freq": 2}}),
    (
        "training.rollout_correction.threshold",
        {"training": {"rollout_correction": {"threshold": 5.0}}},
        {"training": {"rollout_correction": {"rollout_is": "token"}}},
    ),
    (
        "training.reward",
        {"injection": "w4a4", "training": {"reward": "math_verify", "distillation": {"alone": True}}},
        {"training": {"distillation": {"alone": False}}},
    ),
    ("training.distillation", {"training": {"distillation": {"teacher": "live"}}}, {"injection": "w4a4"}),
    (
        "model.embedded.warm_up_lr",
        {"model": {"embedded": {"warm_up_steps": 0, "warm_up_lr": 1.0}}},
        {"model": {"embedded": {"warm_up_steps": 9}}},
    ),
    ("injection", {"injection": {"mode": "none", "dtype": "float16"}}, {"injection": {"kv_cache": "mxfp8"}}),
    (
        "injection",
        {"injection": {"mode": "w4a4", "apply_during": ["evaluation"]}, "evaluation": {"profiles": ["full", "w4a4"]}},
        {"evaluation": {"profiles": ["full", "deployment"]}},
    ),
    (
        "injection.deployment",
        {"injection": {"mode": "nvfp4_w4a16", "deployment": "compressed_tensors"}},
        {"injection": {"kv_cache": "mxfp8"}},
    ),
    ("injection.seed", {"injection": {"mode": "w4a4", "seed": 3}}, {"injection": {"errors": [{"scale": 0.1}]}}),
    ("injection.seed", {"injection": {"kv_cache": "mxfp8", "seed": 3}}, {"injection": {"grad_input": SR}}),
    (
        "injection.fused_groups",
        {"injection": {"mode": "w4a4", "fused_groups": "free"}},
        {"injection": {"by_pattern": {"*.q_proj": "mxfp8"}}},
    ),
    (
        "injection.apply_during.input",
        {"injection": {"mode": "w4a16", "apply_during": {"input": ["rollout"]}}},
        {"injection": {"mode": "w4a4"}},
    ),
    (
        "noise.targets.final_norm",
        {"noise": {"targets": {"kinds": ["linear"], "final_norm": False}}},
        {"noise": {"targets": {"kinds": ["norm"]}}},
    ),
    ("noise.targets.qk_norms", {"noise": {"targets": {"qk_norms": True}}}, {"model": {"path": "m", "embedded": None}}),
    ("noise.targets.moe", {"noise": {"targets": {"moe": "all"}}}, {"model": {"path": "m", "embedded": None}}),
    ("evaluation.temperature", {"evaluation": {"temperature": 0.5}}, {"evaluation": {"samples": 2}}),
    (
        "evaluation.deployment",
        {"evaluation": {"deployment": "compressed_tensors"}},
        {"evaluation": {"profiles": ["full", "w4a4"]}},
    ),
    (
        "evaluation.deployment",
        {"evaluation": {"deployment": "compressed_tensors"}},
        {"evaluation": {"formats": ["mxfp4"]}},
    ),
    ("rollout.max_model_len", {"rollout": {"max_model_len": 64}}, {"rollout": {"engine": "vllm"}}),
    ("rollout.max_model_len", {"rollout": SERVER}, {"rollout": {"server": None}}),
    ("health.max_rollbacks", {"health": {"max_rollbacks": 5}}, {"health": {"policies": {"gradient": "rollback"}}}),
]


@pytest.mark.parametrize(("key", "content", "change"), CASES, ids=[case[0] for case in CASES])
def test_a_setting_that_cannot_act_is_named_and_one_that_can_is_not(key, content, change):
    """Kind: a knob wired to nothing."""
    assert key in idle(Experiment.model_validate(content))
    assert key not in idle(Experiment.model_validate(merge(content, change)))


def test_defaults_are_never_named():
    assert idle(Experiment()) == {}
    assert idle(Experiment.model_validate({"injection": "w4a4", "noise": {}})) == {}


def test_every_rule_speaks_of_keys_that_there_are_and_has_a_case():
    injection = {"mode": "w4a4", "schedule": {"input": {"from_step": 1}}}
    full = Experiment.model_validate({"injection": injection, "noise": {}, "training": {"distillation": {}}})
    with_a_case = set()
    for key, content, _ in CASES:
        for why, keys in rules(Experiment.model_validate(content)):
            with_a_case |= {why} & ({why} if key in keys else set())
            for name in keys:
                parent, _, last = name.rpartition(".")
                assert hasattr(value_at(full, parent) if parent else full, last), name
    assert with_a_case == set(re.findall(r'yield "([^"]+)"', inspect.getsource(module)))
