"""What verl would not do as the experiment says is refused before the run, with its cause and its cure."""

import pytest

from fp4rl.engines.verl.limits import require_possible
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment

GOOD = {
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.dtype": "bfloat16",
    "actor_rollout_ref.model.lora_rank": 0,
}


def experiment(**parts):
    return Experiment.model_validate({"model": {"path": "m", "dtype": "bfloat16"}, "injection": "w4a16"} | parts)


def test_weights_rounded_in_rollouts_and_inputs_in_training_alone_are_possible():
    only_training = {"mode": "w4a4", "apply_during": {"input": ["training"]}}
    for described in (experiment(), experiment(injection=only_training), experiment(injection=None, noise={})):
        require_possible(described, GOOD.get)


@pytest.mark.parametrize(
    "parts, why",
    [
        (
            {"injection": "w4a8"},
            r"injection: input acts during rollout, and verl's rollout 'vllm' gets rounded weights",
        ),
        (
            {"injection": {"mode": "w4a4", "apply_during": {"input": ["training", "evaluation"]}}},
            r"input acts during evaluation.*take mode w4a16, or .*apply_during: \{input: \[training\]\}",
        ),
        ({"injection": {"mode": "w4a16", "kv_cache": "mxfp8"}}, "kv_cache acts during rollout"),
        (
            {"injection": {"mode": "w4a16", "errors": [{"kind": "relative", "scale": 0.01}]}},
            "errors acts during rollout",
        ),
        (
            {"injection": {"mode": "w4a16", "by_pattern": [{"pattern": "*.q_proj", "input": "mxfp8"}]}},
            "input acts during rollout",
        ),
        ({"noise": {"precision": "float32"}}, "noise.precision: verl's rollouts hold weights in the model's dtype"),
        ({"noise": {"logprobs": "noisy"}}, "algorithm.rollout_correction.bypass_mode=True"),
        ({"training": {"distillation": {}}}, "training.distillation"),
    ],
)
def test_an_experiment_that_verl_cannot_do_is_refused(parts, why):
    with pytest.raises(InvalidValueError, match=why):
        require_possible(experiment(**parts), GOOD.get)


@pytest.mark.parametrize(
    "keys, why",
    [
        ({"actor_rollout_ref.actor.strategy": "fsdp"}, "write actor_rollout_ref.actor.strategy=fsdp2"),
        ({"actor_rollout_ref.actor.fsdp_config.qat.enable": True}, "verl's own QAT would round a second time"),
        ({"actor_rollout_ref.rollout.quantization": "fp8"}, "would round rounded weights again"),
        ({"actor_rollout_ref.model.lora_rank": 8}, r"write actor_rollout_ref\.model\.lora\.merge=True"),
        ({"actor_rollout_ref.model.lora.rank": 8}, r"write actor_rollout_ref\.model\.lora\.merge=True"),
        (
            {"actor_rollout_ref.rollout.dtype": "float16"},
            "rollout.dtype=float16, and the experiment's model.dtype is bfl",
        ),
    ],
)
def test_a_configuration_that_would_act_otherwise_is_refused(keys, why):
    with pytest.raises(InvalidValueError, match=why):
        require_possible(experiment(), (GOOD | keys).get)


def test_merged_adapters_are_possible_and_so_are_plain_ones_where_nothing_is_done_to_weights():
    lora = {"actor_rollout_ref.model.lora_rank": 8}
    require_possible(experiment(), (GOOD | lora | {"actor_rollout_ref.model.lora.merge": True}).get)
    require_possible(experiment(injection=None), (GOOD | lora).get)
