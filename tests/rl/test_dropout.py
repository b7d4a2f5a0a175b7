"""Dropout acts in the forwards that learn, and in none that samples or scores an answer."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl import generate as generate_room
from fp4rl.rl import trainer as trainer_room
from fp4rl.rl.generate import dropout_off, drops
from fp4rl.rl.lora import with_lora
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.model import Embedded, Lora

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


def test_a_sampler_with_dropout_stops_the_run(run, experiment, monkeypatch):
    monkeypatch.setattr(generate_room, "dropout_off", nullcontext)
    with pytest.raises(CheckFailed, match="step 1: decoding and one pass"):
        run(experiment("bf16", **LEARNING_WITH_DROPOUT))


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


OPT = {"vocab_size": 32, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
OPT |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0}


@pytest.mark.parametrize("where", ["nothing", "dropout", "attention_dropout", "layerdrop"])
def test_whatever_is_left_out_at_random_is_found_by_what_happens(where):
    """Kind: chance that no dropout layer stands for. OPT has none: it calls the function."""
    model = OPTForCausalLM(OPTConfig(**OPT | ({where: 0.5} if where != "nothing" else {}))).eval()
    state = torch.random.get_rng_state()
    assert drops(model) == (where != "nothing")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training


def test_dropout_is_found_in_adapters_and_in_rotary_attention():
    model = build(Embedded(num_layers=1), build_tokenizer())
    assert not drops(model)
    assert drops(with_lora(build(Embedded(num_layers=1), build_tokenizer()), Lora(rank=4, dropout=0.1), "base"))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert drops(model)
