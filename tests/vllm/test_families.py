"""Families that vLLM loads or computes in a way of its own (`make test-vllm`; elsewhere these are skipped).

The oracle of scores is transformers; planted differences are changes of one tensor.
"""

import json

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm makes an environment with it")

from scores import SAMPLED, distances, let_go, load_into, near, prompts, rollout
from test_mixture import OF, made

from fp4rl.engines.rollout.held import held
from fp4rl.engines.rollout.mixture import begin_reload
from fp4rl.engines.rollout.vllm import Vllm
from fp4rl.models.load import load
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection

OF["llama4_text"] = {"intermediate_size_mlp": 64, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
OF["deepseek_v3"] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
OF["deepseek_v3"] |= {"kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64}
OF["deepseek_v3"] |= {"v_head_dim": 64, "num_key_value_heads": 2}
OF["deepseek_v3"] |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
OF["qwen3_next"] = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 64}
OF["qwen3_next"] |= {"linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
OF["qwen3_next"] |= {"shared_expert_intermediate_size": 64}
DTYPES = {"qwen3_next": "bfloat16"}
LIMITS = {"float32": 1e-5, "bfloat16": 0.1}
LEFT = {"deepseek_v3": ["*.kv_b_proj"]}
CHANGED = {
    "llama4_text": ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.feed_forward.experts.gate_up_proj"],
    "deepseek_v3": ["model.layers.1.self_attn.kv_b_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"],
    "qwen3_next": ["model.layers.0.linear_attn.conv1d.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight"],
}


@pytest.fixture(scope="module", params=sorted(CHANGED))
def sampled(request, tmp_path_factory):
    one, folder = Vllm(), made(request.param, tmp_path_factory.mktemp(request.param))
    yield one, *load(folder, DTYPES.get(request.param, "float32"))
    let_go(one)


@pytest.mark.parametrize("mode", ["none", "w4a16"])
def test_log_probabilities_are_those_of_the_model(mode, sampled):
    engine, model, tokenizer = sampled
    asked = prompts(tokenizer)
    limit = LIMITS[str(model.dtype).removeprefix("torch.")]
    with rollout(model, Injection.named(mode)):
        for _ in range(2):
            assert distances(model, asked, engine(model, tokenizer, asked, SAMPLED)).max() < limit
        results = list(held(engine.module, weight_stream(model)))
        assert {each.name for each in results} == {name for name, _ in weight_stream(model)}
        assert not any(each.differing for each in results)


def test_inputs_are_rounded_as_in_the_model(sampled):
    engine, model, tokenizer = sampled
    if model.dtype != torch.float32:
        pytest.skip("in bfloat16 inputs differ by more than a step before they are rounded")
    asked, left = prompts(tokenizer), LEFT.get(model.config.model_type, [])
    described = {"mode": "w4a4", "deployment": "compressed_tensors", "targets": {"leave": left}}
    with rollout(model, Injection.model_validate(described)) as attachment:
        assert near(model, asked, engine(model, tokenizer, asked, SAMPLED)) >= 0.99
        attachment.require_calls()


@pytest.mark.parametrize("which", [0, 1])
def test_one_value_that_differs_is_found_where_it_is(which, sampled):
    engine, model, tokenizer = sampled
    engine(model, tokenizer, prompts(tokenizer), SAMPLED)
    name = CHANGED[model.config.model_type][which]
    weights = {each: tensor.clone() for each, tensor in weight_stream(model)}
    weights[name].view(-1)[len(weights[name].view(-1)) // 2 + 1] += 1.0
    begin_reload(engine.module)
    load_into(engine, iter(weights.items()))
    wrong = [each for each in held(engine.module, weight_stream(model)) if each.differing]
    assert [each.name for each in wrong] == [name]
    if "conv1d" not in name:  # packed for a kernel, it is whole or none
        assert wrong[0].differing == 1


def test_what_vllm_computes_otherwise_is_refused_by_name(sampled):
    engine, model, tokenizer = sampled
    asked = prompts(tokenizer)
    kind = model.config.model_type
    injection, words = {
        "llama4_text": ({"kv_cache": "mxfp8"}, "Llama4ForCausalLM stores the values of a key in another order"),
        "deepseek_v3": ({"mode": "w4a8"}, r"kv_b_proj: while it decodes \(MLA\).*targets.leave: \['\*\.kv_b_proj'\]"),
        "qwen3_next": ({"kv_cache": "mxfp8"}, "Qwen3NextForCausalLM keeps states beside caches"),
    }[kind]
    with rollout(model, Injection.model_validate(injection)), pytest.raises(InvalidValueError, match=words):
        engine(model, tokenizer, asked, SAMPLED)


def test_linear_attention_in_float32_is_refused_on_a_cpu(tmp_path):
    model, tokenizer = load(made("qwen3_next", tmp_path))
    with pytest.raises(InvalidValueError, match=r"Qwen3NextForCausalLM has linear attention.*model\.dtype: bfloat16"):
        Vllm()(model, tokenizer, prompts(tokenizer), SAMPLED)


@pytest.mark.parametrize("key", ["scoring_func", "topk_method"])
def test_a_config_that_leaves_the_router_open_is_refused(key, tmp_path):
    folder = made("deepseek_v3", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load(folder)
    with pytest.raises(InvalidValueError, match=f"config.json does not say {key}"):
        Vllm()(model, tokenizer, prompts(tokenizer), SAMPLED)
