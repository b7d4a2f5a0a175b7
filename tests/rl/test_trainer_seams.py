"""Where our trainer meets TRL's: names and arguments, that ours are the ones called, and that the loss is TRL's."""

import inspect
from dataclasses import fields

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from fp4rl.models.load import load
from fp4rl.rl import trainer as trainer_room
from fp4rl.rl.components import arguments
from fp4rl.rl.events import ignore
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.rollout import by_length, group_advantages
from fp4rl.rl.run import Run
from fp4rl.rl.session import ResumeState, TrainingSession
from fp4rl.rl.trainer import Trainer, _AroundTheOptimizer

SEAMS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "log": ["self", "logs", "start_time"],
    "create_model_card": None,
    "create_optimizer": ["self", "model"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_clip_grad_norm": ["self", "model"],
}


@pytest.mark.parametrize("name", SEAMS)
def test_every_method_that_we_replace_is_there_in_trl_with_the_arguments_we_know(name):
    theirs = getattr(GRPOTrainer, name)
    assert name in vars(Trainer), "ours is gone"
    if SEAMS[name] is not None:
        assert list(inspect.signature(theirs).parameters) == SEAMS[name]
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == SEAMS[name]


def test_trls_fused_head_is_asked_for_in_its_own_words():
    taken = inspect.signature(add_fused_lm_head).parameters
    assert {"temperature", "outputs"} <= set(taken)
    assert "fused_lm_head=False, labels=None" in inspect.getsource(add_fused_lm_head)
    assert {"log_probs", "entropy"} <= {field.name for field in fields(FusedCausalLMOutput)}


def test_our_callback_answers_to_events_that_exist():
    ours = {name for name in vars(_AroundTheOptimizer) if name.startswith("on_")}
    assert ours == {
        *("on_train_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save")
    }
    assert all(hasattr(TrainerCallback, name) for name in ours)


def test_what_trl_keeps_between_micro_batches_has_the_names_we_read():
    source = inspect.getsource(GRPOTrainer)
    for name in ("self._buffered_inputs", "self._step", "self._tokenizer", "self._metrics"):
        assert name in source


def test_trl_asks_ours_for_every_batch_every_micro_batch_and_every_line(run, experiment, monkeypatch):
    calls = {"_generate_and_score_completions": 0, "_compute_loss": 0, "log": 0}
    for name in calls:
        real = getattr(Trainer, name)

        def counted(self, *args, _name=name, _real=real, **words):
            calls[_name] += 1
            return _real(self, *args, **words)

        monkeypatch.setattr(Trainer, name, counted)
    run(experiment("bf16", training={"steps": 2, "micro_batch_size": 4}))
    assert calls == {"_generate_and_score_completions": 2, "_compute_loss": 8, "log": 5}


# -- one batch through both


@pytest.fixture
def attempt(experiment, model_cache, tmp_path):
    """Our trainer at its start, with one batch of the dapo recipe in its buffer."""

    def begun(**training):
        torch.set_num_threads(1)
        described = experiment("bf16", training={"temperature": 1.0, "entropy_coeff": 0.0, **training})
        start = start_folder(described.model, described.task, model_cache)
        return TrainingSession(Run(described, tmp_path, start, ignore), ResumeState())

    return begun


def batch_of(trainer, old):
    """A batch as the rollout leaves it, with made-up advantages, so that every answer teaches something."""
    recipe = trainer.parts.recipe
    rows = recipe.train_batch_size * recipe.rollout_n
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * rows)
    rewards = torch.rand(rows, generator=torch.Generator().manual_seed(0)).to(trainer.model.device)
    batch["advantages"] = group_advantages(rewards, recipe.rollout_n)
    if old:
        chance = torch.Generator().manual_seed(1)
        noise = 0.4 * torch.randn(batch["sampling_per_token_logps"].shape, generator=chance)
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"] + noise.to(trainer.model.device)
    # TRL divides dapo's loss by the tokens of the whole generation, rescaled to one accumulation window.
    return batch | {"num_items_in_batch": batch["completion_mask"].sum()}


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("old", [False, True], ids=["on policy", "later update"])
def test_the_loss_through_the_trainer_is_trls_own(old, attempt, tmp_path):
    """The dapo recipe on one batch that is the whole update: values and gradients."""
    ours = attempt(train_batch_size=4, mini_batch_size=4).trainer
    batch = batch_of(ours, old)
    ours._buffered_inputs = [batch]
    loss = ours._compute_loss(ours.model, batch)
    found = gradients(ours, loss)

    model, tokenizer = load(ours.model.config._name_or_path)
    theirs = GRPOTrainer(
        model=model,
        reward_funcs=[lambda **_: []],
        args=GRPOConfig(**arguments(ours.parts.recipe, tmp_path, 0), loss_type="dapo", epsilon_high=0.28),
        train_dataset=ours.train_dataset,
        processing_class=tokenizer,
    )
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    expected = theirs._compute_loss(theirs.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    wanted = gradients(theirs, expected)
    assert found.keys() == wanted.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_of_an_update_does_not_depend_on_its_micro_batches(attempt):
    whole = attempt(train_batch_size=4, mini_batch_size=4).trainer
    batch = batch_of(whole, True)
    whole._buffered_inputs = [batch]
    want = gradients(whole, whole._compute_loss(whole.model, batch))
    parts = [{name: value[i : i + 4] for name, value in batch.items() if value.dim()} for i in range(0, 16, 4)]
    parts = by_length(parts, 4)
    split = attempt(train_batch_size=4, mini_batch_size=4, micro_batch_size=4).trainer
    split.model.train()
    split._buffered_inputs = parts
    split.model.zero_grad()
    for i, part in enumerate(parts):
        split._step = i
        split._compute_loss(split.model, part).backward()
    for name, p in split.model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-6)


def test_the_first_update_needs_no_forward_for_old_log_probabilities(run, experiment, monkeypatch):
    """One step of two updates: the second one's rows are scored once more, the first one's are not."""
    scored = []
    real = trainer_room.answer_logps

    def counted(model, batch, **words):
        scored.append((len(batch["completion_ids"]), torch.is_grad_enabled()))
        return real(model, batch, **words)

    monkeypatch.setattr(trainer_room, "answer_logps", counted)
    run(experiment("bf16", training={"steps": 1}))
    compared = (16, False)  # the sampler's own answers, once, while its noise is on
    assert scored == [compared, (8, True), (8, False), (8, True)]
