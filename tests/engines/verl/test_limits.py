"""What verl would not do as the experiment says is refused before the run, with its cause and its cure."""

import pytest

from fp4rl.engines.verl.configuration import decided
from fp4rl.engines.verl.limits import require_possible
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment

GOOD = {
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.dtype": "bfloat16",
    "actor_rollout_ref.model.lora_rank": 0,
}


def configured(described, **keys):
    """Return a reader of verl's keys as the experiment decides them, beside GOOD, with changed ones."""
    own = {key.lstrip("+"): value for key, value in decided(described).items()}
    return (GOOD | own | keys).get


def experiment(**parts):
    return Experiment.model_validate({"model": {"path": "m", "dtype": "bfloat16"}, "injection": "w4a16"} | parts)


def test_weights_rounded_in_rollouts_and_inputs_in_training_alone_are_possible():
    only_training = {"mode": "w4a4", "apply_during": {"input": ["training"]}}
    for described in (experiment(), experiment(injection=only_training), experiment(injection=None, noise={})):
        require_possible(described, configured(described))


@pytest.mark.parametrize("injection", ["w4a8", "w4a4", {"mode": "w4a16", "kv_cache": "mxfp8"}])
def test_verls_vllm_rounds_inputs_and_what_it_stores(injection):
    require_possible(experiment(injection=injection), configured(experiment(injection=injection)))


BY_PATTERN = {"mode": "w4a16", "by_pattern": [{"pattern": "*.q_proj", "input": "mxfp8"}]}


@pytest.mark.parametrize(
    "injection, keys, why",
    [
        ("w4a8", {"rollout.name": "sglang"}, r"input acts during rollout, and verl's rollout 'sglang' gets rounded w"),
        (
            {"mode": "w4a4", "apply_during": {"input": ["training", "evaluation"]}},
            {"rollout.name": "trtllm"},
            r"input acts during evaluation.*take mode w4a16, or .*apply_during: \{input: \[training\]\}",
        ),
        ({"mode": "w4a16", "kv_cache": "mxfp8"}, {"rollout.name": "sglang"}, "kv_cache acts during rollout"),
        (BY_PATTERN, {"rollout.name": "sglang"}, "input acts during rollout"),
        (
            "w4a8",
            {"rollout.tensor_model_parallel_size": 2},
            r"tensor_model_parallel_size: a rollout that rounds has on",
        ),
        ("w4a8", {"rollout.data_parallel_size": 2}, r"data_parallel_size: a rollout that rounds has one worker"),
        ("w4a8", {"rollout.disaggregation.enabled": True}, "disaggregation.enabled: its servers are others"),
        ("w4a8", {"rollout.enforce_eager": False}, "enforce_eager=False, and the experiment has True"),
    ],
)
def test_a_rollout_that_would_not_round_is_refused(injection, keys, why):
    described = experiment(injection=injection)
    with pytest.raises(InvalidValueError, match=why):
        require_possible(described, configured(described, **{f"actor_rollout_ref.{k}": v for k, v in keys.items()}))


def test_ascend_does_not_round_inputs_to_four_bits_in_rollouts():
    """Its W4A4 weights cannot be refreshed in place; wider inputs need none of that."""
    npu = {"trainer.device": "npu"}
    require_possible(experiment(injection="w4a8"), configured(experiment(injection="w4a8"), **npu))
    four = {"mode": "w4a8", "by_pattern": [{"pattern": "*.q_proj", "input": "mxfp4"}]}
    for described in (experiment(injection="w4a4"), experiment(injection=four)):
        with pytest.raises(InvalidValueError, match="input acts during rollout, and Ascend cannot take new W4A4 wei"):
            require_possible(described, configured(described, **npu))


@pytest.mark.parametrize(
    "parts, why",
    [
        (
            {"injection": {"weight": "mxfp4", "output": "mxfp8"}},
            "output acts during rollout, and verl's rollout 'vllm' r",
        ),
        (
            {"injection": {"mode": "w4a16", "errors": [{"kind": "relative", "scale": 0.01}]}},
            "errors acts during rollout",
        ),
        ({"noise": {"precision": "float32"}}, "noise.precision: verl's rollouts hold weights in the model's dtype"),
        ({"training": {"distillation": {}}}, "training.distillation"),
    ],
)
def test_an_experiment_that_verl_cannot_do_is_refused(parts, why):
    with pytest.raises(InvalidValueError, match=why):
        require_possible(experiment(**parts), configured(experiment(**parts)))


@pytest.mark.parametrize(
    "keys, why",
    [
        ({"actor_rollout_ref.actor.strategy": "fsdp"}, "actor.strategy=fsdp, and the experiment has fsdp2"),
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
        require_possible(experiment(), configured(experiment(), **keys))


def test_merged_adapters_are_possible_and_so_are_plain_ones_where_nothing_is_done_to_weights():
    model = {"path": "m", "dtype": "bfloat16", "lora": {"rank": 8, "alpha": 16}}
    for described in (experiment(model=model), experiment(model=model, injection=None)):
        require_possible(described, configured(described))


@pytest.mark.parametrize(
    "key, value",
    [
        ("actor_rollout_ref.actor.optim.lr", 1e-5),
        ("actor_rollout_ref.rollout.n", 4),
        ("actor_rollout_ref.actor.clip_ratio_high", 0.2),
        ("actor_rollout_ref.model.path", "/other"),
        ("algorithm.rollout_correction.rollout_is", "token"),
        ("actor_rollout_ref.actor.fsdp_config.mixed_precision", {"param_dtype": "fp16"}),
        ("trainer.total_training_steps", 31),
        ("data.seed", 8),
    ],
)
def test_an_override_of_what_the_experiment_decides_is_refused_by_name(key, value):
    with pytest.raises(InvalidValueError, match=rf"^{key}=.*, and the experiment has .*; change that"):
        require_possible(experiment(), configured(experiment(), **{key: value}))


def test_a_value_that_only_looks_other_is_the_same():
    described = experiment()
    require_possible(described, configured(described, **{"actor_rollout_ref.actor.optim.lr": 1e-6 * (1 + 1e-15)}))
