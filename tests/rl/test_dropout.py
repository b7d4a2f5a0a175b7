"""Dropout acts in the forwards that learn, and in none that samples or scores an answer."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl import rollout as rollout_room
from fp4rl.rl import trainer as trainer_room
from fp4rl.rl.dropout import dropout_off, drops
from fp4rl.spec.model import Embedded

LEARNING_WITH_DROPOUT = {
    "model": {"lora": {"rank": 4, "dropout": 0.5}},
    # An adapter begins at zero, where leaving out its input does nothing: the second step is the one to look at. The
    # entropy has a gradient whatever the answers earn.
    "training": {"lr": 1e-2, "entropy_coeff": 0.1},
    "evaluation": {"count": 1, "profiles": ["full"]},
}


def test_the_answers_are_those_of_the_whole_model_which_then_learns_with_dropout(run, experiment, monkeypatch):
    learning, real = [], trainer_room.objective

    def spied(batch, *rest):
        learning.append(batch)
        return real(batch, *rest)

    monkeypatch.setattr(trainer_room, "objective", spied)
    _, heard = run(experiment("bf16", **LEARNING_WITH_DROPOUT))
    assert all(metrics["rollout_corr/k3_kl"] < 1e-4 for _, metrics in heard.steps)
    assert all(batch.old_logps is not None for batch in learning), "the whole policy is not the one that learns"
    moved = [(batch.logps.detach() - batch.old_logps)[batch.mask.bool()].abs().max().item() for batch in learning]
    assert moved[0] < 1e-4 < 1e-2 < moved[2], "no dropout in the first update of the second step"


def test_a_sampler_with_dropout_would_be_seen(run, experiment, monkeypatch):
    monkeypatch.setattr(rollout_room, "dropout_off", nullcontext)
    _, heard = run(experiment("bf16", **LEARNING_WITH_DROPOUT))
    assert heard.steps[1][1]["rollout_corr/k3_kl"] > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_its_own_mode_again_also_after_an_error(training):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(training)
    seen = []

    def failing():
        with dropout_off(model):
            seen.extend(module.training for module in model.modules())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert seen == [False] * 3
    assert all(module.training == training for module in model.modules())


def test_dropout_is_found_in_layers_and_in_attention():
    assert not drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    assert drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    model = build(Embedded(num_layers=1), build_tokenizer())
    assert not drops(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    ids = torch.arange(9).unsqueeze(0)
    model.train()
    assert drops(model)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
