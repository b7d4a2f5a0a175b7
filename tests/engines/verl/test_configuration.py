"""Every key of an experiment reaches verl under a key that its configuration has, or is refused by name."""

import re
from pathlib import Path

import pytest
import yaml

from fp4rl.engines.verl.configuration import Files, configuration, micro_batch
from fp4rl.engines.verl.differences import differences, require_expressible
from fp4rl.engines.verl.keys import NO_DUAL_CLIP, SAME
from fp4rl.engines.verl.machines import CPU, GPU, NPU
from fp4rl.engines.verl.script import verl_run
from fp4rl.lab.matrix import single
from fp4rl.spec.algorithms import ALGORITHMS
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.idle import value_at
from fp4rl.spec.training import Training

HERE = Path(__file__)
KNOWN = frozenset((HERE.parents[2] / "data/verl/keys_0.9.1.txt").read_text().split())
ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))


def experiment(**content):
    training = {"train_batch_size": 64, "mini_batch_size": 32, "rollout_n": 8} | content.pop("training", {})
    return Experiment.model_validate({"model": {"path": "models/m"}, "training": training, **content})


def configured(machine=GPU, devices=8, **content):
    run = single(experiment(**content), "mine")
    return configuration(run, machine, devices, Files(Path("/x/run.sh")), "TEMPLATE")


RICH = {
    "model": {"path": "models/m", "dtype": "float32", "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"]}},
    "injection": "w4a8",
    "training": {
        "algorithm": "grpo",
        "steps": 7,
        "train_batch_size": 24,
        "mini_batch_size": 8,
        "rollout_n": 4,
        "lr": 3e-5,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "weight_decay": 0.3,
        "grad_clip": 0.7,
        "entropy_coeff": 0.01,
        "clip_ratio_low": 0.11,
        "clip_ratio_high": 0.33,
        "clip_ratio_c": 4.0,
        "kl_loss_coef": 0.02,
        "kl_loss_type": "k3+",
        "loss_agg_mode": "seq-mean-token-sum",
        "adv_estimator": "rloo",
        "temperature": 0.9,
        "norm_adv_by_std": False,
        "top_p": 0.8,
        "max_prompt_length": 99,
        "max_response_length": 77,
        "save_freq": 3,
        "overlong_buffer": {"enable": True, "len": 11, "penalty_factor": 0.4},
        "gradient_checkpointing": True,
        "filter_groups": {"enable": True, "metric": "acc", "max_num_gen_batches": 9},
        "rollout_correction": {"rollout_is": "sequence", "threshold": 3.0},
    },
    "evaluation": {"count": 13, "test_freq": 2, "samples": 4, "temperature": 0.6, "max_new_tokens": 77},
    "seed": 5,
}


def test_every_key_is_one_of_verls_or_is_declared_as_new():
    given = {key for machine in (GPU, NPU, CPU) for kind in ({}, RICH) for key in configured(machine, 4, **kind)}
    assert {key for key in given if key.lstrip("+") not in KNOWN} == {key for key in given if key.startswith("+")}


def test_what_means_the_same_has_the_value_of_the_experiment():
    found, described = configured(devices=4, **RICH), experiment(**RICH)
    assert {same.verl: found[same.verl] for same in SAME} == {
        same.verl: value_at(described, same.spec) for same in SAME
    }


def test_what_is_named_in_other_words():
    found = configured(devices=4, **RICH)
    expected = {
        f"{ACTOR}.policy_loss.loss_mode": "vanilla",
        f"{ACTOR}.use_kl_loss": True,
        f"{ACTOR}.fsdp_config.model_dtype": "fp32",
        f"+{ACTOR}.fsdp_config.mixed_precision": {
            "param_dtype": "fp32",
            "reduce_dtype": "fp32",
            "buffer_dtype": "fp32",
        },
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": 8,
        f"{ROLLOUT}.dtype": "float32",
        f"{ROLLOUT}.val_kwargs.n": 4,
        f"{ROLLOUT}.val_kwargs.do_sample": True,
        f"{ROLLOUT}.val_kwargs.temperature": 0.6,
        f"{MODEL}.lora_rank": 16,
        f"{MODEL}.lora_alpha": 32,
        f"{MODEL}.target_modules": ["q_proj", "v_proj"],
        f"{MODEL}.lora.merge": True,
        "+reward.reward_kwargs.overlong_buffer_cfg.enable": True,
        "+reward.reward_kwargs.overlong_buffer_cfg.len": 11,
        "+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": 0.4,
        "+reward.reward_kwargs.max_resp_len": 77,
        "algorithm.rollout_correction.rollout_is": "sequence",
        "algorithm.rollout_correction.rollout_is_threshold": 3.0,
        "trainer.v1.trainer_mode": "fp4rl",
        "+ray_kwargs.ray_init.runtime_env.env_vars.FP4RL_VERL_SPEC": "/x/run.spec.yaml",
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("algorithm", "loss", "low", "high", "aggregation"),
    [
        ("dapo", "vanilla", 0.2, 0.28, "token-mean"),
        ("grpo", "vanilla", 0.2, 0.2, "seq-mean-token-mean"),
        ("dr_grpo", "vanilla", 0.2, 0.2, "seq-mean-token-sum-norm"),
        ("gspo", "gspo", 3e-4, 4e-4, "seq-mean-token-mean"),
        ("cispo", "cispo", 1.0, 4.0, "token-mean"),
    ],
)
def test_defaults_of_an_algorithm_are_written_out(algorithm, loss, low, high, aggregation):
    found = configured(training={"algorithm": algorithm, "max_response_length": 500})
    assert [found[f"{ACTOR}.{key}"] for key in ("clip_ratio_low", "clip_ratio_high", "loss_agg_mode")] == [
        low,
        high,
        aggregation,
    ]
    assert found[f"{ACTOR}.policy_loss.loss_mode"] == loss
    assert found[f"{ACTOR}.loss_scale_factor"] == (500 if algorithm == "dr_grpo" else None)
    assert found[f"{ACTOR}.clip_ratio_c"] == NO_DUAL_CLIP  # fp4rl has none unless asked, verl 3


def test_every_algorithm_has_its_policy_loss():
    for name in ALGORITHMS:
        require_expressible(experiment(training={"algorithm": name}), 8)


def test_masked_importance_weights_have_two_bounds():
    correction = {"rollout_is": "token", "mode": "mask", "threshold": 4.0}
    found = configured(training={"rollout_correction": correction})
    assert found["algorithm.rollout_correction.rollout_is_threshold"] == "0.25_4.0"


def test_an_rslora_becomes_the_alpha_of_the_same_scale():
    lora = {"rank": 16, "alpha": 32.0, "rslora": True}
    alpha = configured(model={"path": "m", "lora": lora})[f"{MODEL}.lora_alpha"]
    assert alpha / 16 == 32.0 / 16**0.5


def test_adapters_are_merged_where_rollouts_are_to_get_rounded_or_noisy_weights():
    model = {"path": "m", "lora": {"rank": 16}}
    merged = [
        configured(model=model, **more)[f"{MODEL}.lora.merge"] for more in ({}, {"injection": "w4a16"}, {"noise": {}})
    ]
    assert merged == [False, True, True]


def test_noisy_log_probabilities_are_the_samplers():
    key = "algorithm.rollout_correction.bypass_mode"
    assert [configured(noise={"logprobs": kind})[key] for kind in ("clean", "noisy")] == [False, True]


def test_the_last_step_is_kept_and_judged_where_nothing_is_asked_for():
    found = configured(training={"steps": 12})
    assert (found["trainer.save_freq"], found["trainer.test_freq"]) == (12, 12)
    assert found["trainer.total_epochs"] == found["trainer.total_training_steps"] == 12


@pytest.mark.parametrize(
    ("asked", "devices", "given"), [(None, 8, 8), (4, 8, 4), (64, 8, 32), (None, 32, 8), (5, 8, 4)]
)
def test_micro_batches_divide_what_a_device_has(asked, devices, given):
    recipe = experiment(training={"micro_batch_size": None}).training
    recipe = recipe.model_copy(update={"micro_batch_size": asked})
    assert micro_batch(recipe, devices) == given


@pytest.mark.parametrize(
    ("content", "key", "cure"),
    [
        ({"model": {"embedded": {}}}, "model.embedded", "model.path"),
        ({"model": {"path": "m", "lora": {"dropout": 0.1}}}, "model.lora.dropout", "write 0"),
        ({"model": {"path": "m", "lora": {"rank": 2, "rslora": True}}}, "model.lora.alpha", "whole number"),
        ({"model": {"path": "m", "experts_implementation": "eager"}}, "model.experts_implementation", "leave it out"),
        ({"training": {"lr_scheduler": "linear"}}, "training.lr_scheduler", "constant and cosine"),
        ({"training": {"mask_truncated": True}}, "training.mask_truncated", "write false"),
        ({"training": {"routing_replay": True}}, "training.routing_replay", "write false"),
        ({"training": {"ema": {"decay": 0.9}}}, "training.ema", "leave it out"),
        ({"training": {"oscillation": {}}, "injection": "w4a16"}, "training.oscillation", "leave it out"),
        ({"training": {"learned_clipping": {}}, "injection": "w4a16"}, "training.learned_clipping", "leave it out"),
        (
            {"training": {"deployed": "best"}, "evaluation": {"test_freq": 1}},
            "training.deployed",
            "write last",
        ),
        ({"training": {"stop": ["####"]}}, "training.stop", "leave it out"),
        ({"start": {"run": "suite/a-s0-0123"}}, "start", "name the folder `final` of that run there"),
        ({"training": {"distillation": {}}}, "training.distillation", "leave it out"),
        (
            {"injection": {"weight": "mxfp4", "output": "mxfp8"}},
            "injection: output",
            "apply_during: {output: [training]}",
        ),
        ({"training": {"mini_batch_size": 1, "rollout_n": 4}}, "training.mini_batch_size", "--devices"),
        ({"evaluation": {"max_new_tokens": 7}}, "evaluation.max_new_tokens", "write 1024"),
        ({"rollout": {"engine": "vllm", "server": "http://h:1"}}, "rollout.server", "leave it out"),
        ({"noise": {"logprobs": "noisy"}, "training": {"algorithm": "gspo"}}, "noise.logprobs", "write clean"),
        ({"noise": {"precision": "float32"}}, "noise.precision", "write weight"),
    ],
)
def test_what_verl_cannot_express_is_refused_by_name_with_the_cure(content, key, cure):
    with pytest.raises(InvalidValueError, match=re.escape(key)) as refused:
        verl_run(single(experiment(**content), "mine"), GPU, 8, Files(Path("/x/run.sh")))
    assert cure in str(refused.value)


@pytest.mark.parametrize(
    ("injection", "eager"),
    [
        ("w4a4", True),
        ("w4a8", True),
        ("w4a16", None),
        ({"mode": "w4a4", "apply_during": {"input": ["training"]}}, None),
    ],
)
def test_a_rollout_that_rounds_inputs_itself_computes_without_graphs(injection, eager):
    keys = verl_run(single(experiment(injection=injection), "mine"), GPU, 8, Files(Path("/x/run.sh"))).configuration
    assert keys.get("actor_rollout_ref.rollout.enforce_eager") is eager


@pytest.mark.parametrize("machine", [NPU, CPU])
def test_inputs_in_four_bits_are_rounded_in_rollouts_on_gpus_alone(machine):
    with pytest.raises(InvalidValueError, match="injection: input acts during rollout"):
        verl_run(single(experiment(injection="w4a4"), "mine"), machine, 2, Files(Path("/x/run.sh")))


def test_another_optimizer_is_refused():
    for training in ({"betas": [0.8, 0.9]}, {"optimizer": "adamw_torch_8bit"}):
        with pytest.raises(InvalidValueError, match="optimizer and betas"):
            require_expressible(experiment(training=training), 8)


def test_no_key_of_training_is_dropped_silently():
    """Each changes what verl is asked for, or is refused, or is read by the reward or the plug-in out of the file."""
    batches, asked = {"train_batch_size", "mini_batch_size", "rollout_n"}, configured(devices=4, **RICH)
    for key in RICH["training"].keys() - batches:
        without = {**RICH, "training": {k: v for k, v in RICH["training"].items() if k != key}}
        without["evaluation"] = {**RICH["evaluation"], "max_new_tokens": 77 if key != "max_response_length" else 1024}
        assert configured(devices=4, **without) != asked, key
    others = set(Training.model_fields) - set(RICH["training"])
    refused = {"mask_truncated", "routing_replay", "distillation", "optimizer", "betas", "stop", "ema", "deployed"}
    refused |= {"oscillation", "learned_clipping"}
    said = {"save_total_limit"}  # as a difference
    before = {"epochs", "filter_overlong_prompts"}  # in steps, and left out, when description and data are written
    assert others == refused | said | before | {"micro_batch_size", "reward", "rewards", "reference_precision"}


def test_what_differs_in_meaning_is_said():
    said = "\n".join(differences(experiment(**RICH), GPU, 4))
    for words in ("order of problems", "samples with vLLM", "once a step", "reads no limit", "punishes overlong"):
        assert words in said
    assert "keeps the last step" not in said
    assert "save_total_limit: verl keeps every checkpoint" in said
    assert "keeps the last step" in "\n".join(differences(experiment(), GPU, 8))


def test_the_file_of_a_run_is_read_as_it_is_described(tmp_path):
    described = experiment(**RICH)
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(described.model_dump(mode="json")))
    from fp4rl.spec.load import load_spec

    assert load_spec(file) == described
