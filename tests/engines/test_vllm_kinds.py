"""What vLLM's modules round for the sites of a model, and what is refused, by their states alone: no vLLM is needed."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.engines.rollout.attention import rounding_cache
from fp4rl.engines.rollout.kinds import active
from fp4rl.engines.rollout.request import require_possible
from fp4rl.inject.attach import attach
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.generate import Sampling
from fp4rl.rl.stream import injected_states
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(Embedded(), build_tokenizer()).eval()


def states_of(model, described, phase="rollout"):
    attachment = attach(model, Injection.model_validate(described))
    attachment.set_phase(phase)
    return active(injected_states(model)), attachment


class Attention(torch.nn.Module):
    """vLLM's attention in shape: two heads of 32, flat keys and values; it keeps what it would store."""

    num_kv_heads, head_size, head_size_v = 2, 32, 32

    def forward(self, query, key, value, output_shape=None):
        self.stored = key, value, output_shape
        return query


def test_keys_and_values_are_rounded_per_head_and_counted(model):
    states, attachment = states_of(model, {"kv_cache": "mxfp4", "dtype": "float32"})
    layer, (state, *_) = Attention(), states
    key, value = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with rounding_cache(layer, [state]):
        assert layer(key, key, value=value, output_shape=(5, 64)) is key
        (rounded, other, shape), own = layer.stored, key.view(5, 2, 32)
        assert (rounded.shape, other.shape, shape) == ((5, 2, 32), (5, 2, 32), (5, 64))
        levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        for token in range(5):
            for head in range(2):  # E2M1 under one power of two a head
                scale = 2.0 ** (own[token, head].abs().max().log2().floor() - 2)
                assert torch.isin(rounded[token, head].abs() / scale, levels).all()
    layer(key, key, value)
    assert layer.stored[0] is key  # afterwards it stores what it is given
    (row,) = (row for row in attachment.evidence() if row.site == state.plan.name)
    assert (row.calls, row.elements, row.missed) == (1, 2 * 5 * 64, 0)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"kv_cache": "mxfp4_sr"}, "drawn anew whenever transformers reads it; take rounding: nearest_even"),
        ({"kv_cache": "nvfp4"}, "one number for several tokens; take factor: per_token or static"),
        ({"kv_cache": {"name": "mxfp4", "block": [32, 32]}}, "for several tokens; .*, and blocks of one row"),
        ({"weight": "mxfp4", "output": "mxfp4"}, r"output of model\.layers\.0\.self_attn\.q_proj as this model does"),
    ],
)
def test_what_a_cache_that_is_written_once_would_not_hold_is_refused(described, words, model):
    states, _ = states_of(model, described)
    with pytest.raises(InvalidValueError, match=f"rollout.engine vllm does not compute .*{words}"):
        require_possible(states, Sampling(4))


@pytest.mark.parametrize("kv_cache", ["mxfp8", "mxfp4", {"name": "nvfp4", "factor": "per_token"}])
def test_what_is_rounded_a_token_and_a_head_for_itself_is_possible(kv_cache, model):
    states, _ = states_of(model, {"mode": "w4a8", "kv_cache": kv_cache})
    require_possible(states, Sampling(4))
    assert {state.plan.site.kind for state in states} == {"linear", "attention"}


def test_what_does_not_act_in_rollouts_is_not_asked_for(model):
    during = {"kv_cache": ["training"], "weight": ["rollout"]}
    states, _ = states_of(model, {"weight": "mxfp4", "kv_cache": "mxfp4_sr", "apply_during": during})
    require_possible(states, Sampling(4))
    assert {state.plan.site.kind for state in states} == {"linear"}


def test_latent_vectors_are_refused_with_their_class():
    config = AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        vocab_size=64,
    )
    states, _ = states_of(AutoModelForCausalLM.from_config(config), {"kv_cache": "mxfp8"})
    with pytest.raises(InvalidValueError, match=r"layers\.0\.self_attn: DeepseekV3Attention stores latent vectors"):
        require_possible(states, Sampling(4))
