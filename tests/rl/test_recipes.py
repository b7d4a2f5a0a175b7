"""Recipes in the trainer: every algorithm, the reference in either precision, distillation, adapters."""

import pytest
import torch

from fp4rl.inject.evidence import master_digest
from fp4rl.models.load import load
from fp4rl.rl import objective as objective_room
from fp4rl.rl import reference as reference_room
from fp4rl.rl import session as session_room
from fp4rl.spec.errors import InvalidValueError

LORA = {"lora": {"rank": 4, "alpha": 8.0}}


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_every_algorithm_trains_for_two_steps(algorithm, run, experiment):
    trained, heard = run(experiment("bf16", training={"algorithm": algorithm}))
    assert trained.steps_done == 2
    assert any(metrics["grad_norm"] > 0 for _, metrics in heard.steps)


@pytest.mark.parametrize("precision", ["full", "deployment"])
def test_kl_to_a_reference_in_the_deployments_precision_starts_at_zero_and_to_bf16_does_not(precision, run, experiment):
    recipe = {"kl_loss_coef": 0.1, "reference_precision": precision, "mini_batch_size": 4, "steps": 1}
    _, heard = run(experiment("w4a4", training=recipe))
    kl = heard.steps[0][1]["kl"]
    assert kl == 0.0 if precision == "deployment" else kl > 0.01


@pytest.mark.slow
def test_kl_grows_as_the_policy_leaves_its_start(run, experiment):
    recipe = {"kl_loss_coef": 1e-6, "steps": 4, "lr": 3e-3, "mini_batch_size": 4, "rollout_n": 8}
    _, heard = run(experiment("bf16", training=recipe))
    assert heard.steps[0][1]["kl"] == 0.0
    assert heard.steps[-1][1]["kl"] > 1e-4


@pytest.mark.slow
def test_a_strong_kl_holds_the_policy_at_its_start(run, experiment):
    def last(coefficient, name):
        recipe = {"kl_loss_coef": coefficient, "steps": 6, "lr": 3e-3, "rollout_n": 8}
        return run(experiment("bf16", training=recipe), name)[1].steps[-1][1]["kl"]

    assert last(10.0, "strong") < 0.3 * last(1e-6, "weak")


def test_a_reference_that_would_be_quantized_against_its_name_is_refused(run, experiment):
    phases = ["rollout", "training", "evaluation", "reference"]
    with pytest.raises(InvalidValueError, match="reference_precision: deployment"):
        run(experiment("w4a4", injection={"apply_during": phases}, training={"kl_loss_coef": 0.1}))


# -- distillation


def course(run, experiment, steps=15, **distillation):
    recipe = {
        "steps": steps,
        "lr": 1e-4,
        "train_batch_size": 16,
        "mini_batch_size": 16,
        "max_response_length": 24,
        "overlong_buffer": {"len": 6},
        "distillation": distillation,
    }
    _, heard = run(experiment("w4a4", training=recipe, evaluation={"count": 4}))
    return [metrics["distill/kl"] for _, metrics in heard.steps]


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "distillation",
    [
        {"alone": True},
        pytest.param({"alone": True, "direction": "reverse"}, marks=pytest.mark.slow),
        pytest.param({"coef": 10.0}, marks=pytest.mark.slow),
    ],
    ids=["alone", "reverse", "with RL"],
)
def test_distillation_brings_the_4_bit_student_to_its_unquantized_teacher(distillation, run, experiment):
    kl = course(run, experiment, **distillation)
    assert mean(kl[-5:]) < 0.75 * mean(kl[:3])


@pytest.mark.slow
def test_a_distillation_of_the_wrong_sign_would_be_noticed(run, experiment, monkeypatch):
    real = reference_room.teacher_kl
    monkeypatch.setattr(reference_room, "teacher_kl", lambda *args, **words: -real(*args, **words))
    kl = [-value for value in course(run, experiment, alone=True)]
    assert mean(kl[-5:]) > mean(kl[:3])


@pytest.mark.slow
def test_a_live_teacher_is_the_unquantized_policy_itself(run, experiment):
    recipe = {"steps": 2, "distillation": {"teacher": "live"}}
    _, unquantized = run(experiment("bf16", training=recipe), "bf16")
    _, quantized = run(experiment("w4a4", training=recipe), "w4a4")
    assert len(unquantized.steps) == len(quantized.steps) == 2
    assert all(metrics["distill/kl"] < 1e-6 for _, metrics in unquantized.steps)
    assert all(metrics["distill/kl"] > 1e-3 for _, metrics in quantized.steps)


# -- adapters


@pytest.mark.parametrize("deployed", ["adapter", "merged"])
def test_lora_trains_its_adapter_alone_and_judges_it_from_its_folder(deployed, run, experiment, start_folder):
    changes = {"model": LORA, "training": {"lr": 1e-2}, "injection": {"lora": deployed}}
    trained, heard = run(experiment("w4a16", **changes))
    assert (trained.final / "adapter_config.json").is_file()
    assert not (trained.final / "model.safetensors").exists()
    model, _ = load(trained.final)
    before, _ = load(start_folder)
    base = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(base[name], weight) for name, weight in before.named_parameters())
    changed = [name for name, p in base.items() if "lora_B" in name and p.abs().max() > 0]
    assert len(changed) == 14
    assert trained.evidence.live_equals_fresh
    assert [e.step for e in heard.evaluations] == [0, 0, 2, 2]


def test_lora_needs_no_second_copy_of_the_base_for_its_reference(run, experiment, monkeypatch):
    def copied(*_):
        raise AssertionError("the base was copied")

    monkeypatch.setattr(reference_room, "load", copied)
    recipe = {"kl_loss_coef": 0.1, "lr": 1e-2, "mini_batch_size": 4, "distillation": {"coef": 0.1}}
    _, heard = run(experiment("bf16", model=LORA, training=recipe))
    assert heard.steps[0][1]["kl"] == heard.steps[0][1]["distill/kl"] == 0.0
    assert heard.steps[1][1]["kl"] > 1e-6  # the adapter has left its start, the base has not


@pytest.mark.slow
def test_the_fresh_adapter_starts_from_the_seed(run, experiment):
    digests = {}
    real = session_room.opened

    def opened(run_):
        model, tokenizer = real(run_)
        digests.setdefault(run_.folder.name, set()).add(master_digest(model))  # opened for the proof before it, too
        return model, tokenizer

    session_room.opened = opened
    try:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            run(experiment("bf16", model=LORA, seed=seed, training={"steps": 1}), name)
    finally:
        session_room.opened = real
    assert [len(found) for found in digests.values()] == [1, 1, 1]
    assert digests["a"] == digests["b"] != digests["c"]


# -- sampler and trainer as two policies


def test_noisy_log_probabilities_are_the_samplers(run, experiment):
    recipe = {"mini_batch_size": 4, "steps": 1}
    _, clean = run(experiment("w4a16+aqn", training=recipe), "clean")
    _, noisy = run(experiment("w4a16+aqn", training=recipe, noise={"logprobs": "noisy"}), "noisy")
    assert clean.steps[0][1]["ratio/max"] == 1.0
    assert noisy.steps[0][1]["ratio/max"] > 1.0
    assert noisy.steps[0][1]["rollout_corr/k3_kl"] == clean.steps[0][1]["rollout_corr/k3_kl"] > 0


def test_the_noise_of_the_sampler_is_not_corrected_for_twice(run, experiment):
    recipe = {"rollout_correction": {"rollout_is": "token"}}
    with pytest.raises(InvalidValueError, match="correct twice"):
        run(experiment("w4a16+aqn", training=recipe, noise={"logprobs": "noisy"}))


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_bfloat16_weights_train_and_the_saved_policy_is_the_live_one(lora, run, experiment):
    recipe = {"lr": 1e-2, "steps": 1, "entropy_coeff": 0.01}  # a gradient even where no answer is right
    described = experiment("w4a16", model={"dtype": "bfloat16", "lora": lora}, training=recipe)
    trained, heard = run(described)
    assert trained.evidence.live_equals_fresh
    assert heard.steps[0][1]["grad_norm"] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_rollout_correction_reaches_the_loss(level, run, experiment, monkeypatch):
    seen = []
    real = objective_room.policy_loss

    def spied(inputs, rule):
        seen.append(inputs.weights)
        return real(inputs, rule)

    monkeypatch.setattr(objective_room, "policy_loss", spied)
    recipe = {"rollout_correction": {"rollout_is": level}, "steps": 1}
    _, heard = run(experiment("w4a16+aqn", training=recipe))
    assert all(weights.shape[1] == 1 if level == "sequence" else weights.shape[1] > 1 for weights in seen)
    assert any((weights != 1).any() for weights in seen)
    assert heard.steps[0][1]["rollout_corr/rollout_is_eff_sample_size"] < 1
