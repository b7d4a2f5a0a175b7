"""A token's log-probability is its own: the same alone, among batch-mates, and decoded with a cache.

In float64, where the order of a sum moves no value across a rounding boundary, what is left is float noise; one FP32
factor for a whole call moves log-probabilities by tenths of a nat.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

STATIC = {"name": "nvfp4", "factor": "static", "calibrated": 4.0}
PER_TOKEN = {"name": "nvfp4", "factor": "per_token"}
ACCEPTED = {
    **{mode: {"mode": mode} for mode in ("w4a16", "w4a8", "w4a4", "w8a8", "nvfp4_w4a16", "nvfp4_w4a4")},
    "nvfp4 static": {"mode": "nvfp4_w4a4", "input": STATIC},
    "nvfp4 everywhere": {"weight": "nvfp4", **dict.fromkeys(("input", "output", "kv_cache"), PER_TOKEN)},
    "fp8 per token": {"weight": "fp8", "input": {"name": "fp8", "factor": "per_token"}},
    "fp8 static": {"weight": "fp8", "input": {"name": "fp8", "factor": "static", "calibrated": 4.0}},
}
REFUSED = {"nvfp4": {"weight": "nvfp4", "input": "nvfp4"}, "fp8": {"weight": "fp8", "input": "fp8"}}
LENGTHS = (5, 11, 8)
NOISE = 1e-9


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def model(request):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15, "vocab_size": 50}
    if request.param == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes)).double().eval()
    made.set_experts_implementation("eager")  # grouped_mm knows no float64
    return made


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]


def scored(logits, ids):
    return torch.log_softmax(logits[:-1], -1).gather(-1, ids[1:, None]).squeeze(-1)


def alone(model):
    return [scored(model(ids[None]).logits[0], ids) for ids in texts()]


def together(model):
    """All in one batch, padded on the left."""
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts()])
    mask = torch.stack([torch.arange(width) >= width - length for length in LENGTHS]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    return [scored(row[width - len(text) :], text) for row, text in zip(logits, texts(), strict=True)]


def decoded(model):
    """Token by token with a cache, behind a prompt of three."""
    found = []
    for ids in texts():
        output = model(ids[None, :3], use_cache=True)
        rows = [output.logits[0]]
        for token in ids[3:]:
            output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            rows.append(output.logits[0])
        found.append(scored(torch.cat(rows), ids))
    return found


def distance(first, other):
    return max((a - b).abs().max().item() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_mode_that_rl_accepts_gives_a_token_one_log_probability(name, model):
    injection = Experiment.model_validate({"injection": ACCEPTED[name]}).injection
    plain = alone(model)
    with torch.no_grad(), attach(model, injection) as attachment:
        attachment.set_phase("rollout")
        by_itself = alone(model)
        assert distance(by_itself, plain) > 1e-3
        assert distance(by_itself, together(model)) < NOISE
        assert distance(by_itself, decoded(model)) < NOISE


@pytest.mark.parametrize("name", REFUSED)
def test_one_factor_for_a_call_gives_it_several_and_is_refused(name, model):
    with pytest.raises(ValueError, match="the log-probability of a token depends on its batch-mates"):
        Experiment.model_validate({"injection": REFUSED[name]})
    with torch.no_grad(), attach(model, Injection.model_validate(REFUSED[name])) as attachment:
        attachment.set_phase("rollout")
        assert distance(alone(model), together(model)) > 1e-3
        assert distance(alone(model), decoded(model)) > 1e-3
