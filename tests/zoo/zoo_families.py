"""Tiny models of the architectures that `transformers` knows: two layers and 64 wide, built from their configs."""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fp4rl.models.tokenizer import build_tokenizer

# What is set wherever a config knows it, by every name that configs have for it.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "bos_token_id"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k", "eos_token_id"), 2),
    "vocab_size": 50,
    "pad_token_id": 0,
}
_DELTA = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_SHARED_KEYS = {  # the last two layers attend to keys and values of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 50,
    "hidden_size_per_layer_input": 32,
}
_SHARED_STATES = {"num_hidden_layers": 3, "n_mamba_heads": 2, "mamba_d_state": 16, "attention_head_dim": 32}
_PAIRED = {"num_key_value_heads": 4}  # as many key heads as query heads

# What needs nothing beyond these sizes: dense models, older dense ones, mixtures of experts, recurrent ones.
_PLAIN = """
llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 granite cohere cohere2 starcoder2
stablelm glm glm4 exaone4 ernie4_5 helium nemotron smollm3 seed_oss hunyuan_v1_dense apertus arcee bitnet diffllama doge
persimmon gpt2 gpt_neox gpt_bigcode bloom mpt opt biogpt ctrl modernbert-decoder
qwen2_moe qwen3_moe mixtral olmoe phimoe granitemoe gpt_oss llama4_text aria_text jetmoe ernie4_5_moe dots1
hunyuan_v1_moe minimax moshi deepseek_v4 afmoe cohere2_moe exaone_moe flex_olmo glm4_moe minimax_m2
mamba falcon_mamba falcon_h1 lfm2 nemotron_h rwkv
"""
# Architecture -> what its config needs beyond the sizes above; None: what it computes itself.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    "deepseek_v2": _PAIRED,
    "deepseek_v3": _PAIRED,
    "glm4_moe_lite": _PAIRED,
    "minicpm3": _PAIRED,
    "qwen3_next": _DELTA,
    "deepseek_v32": _PAIRED | {"index_topk": 4, "index_head_dim": 32, "index_n_heads": 2},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "kimi_linear": _PAIRED | {"layer_types": ["linear_attention", "full_attention"]},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": True, "head_dim": None},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "gemma3n_text": _SHARED_KEYS | {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARED_KEYS | {"global_head_dim": 16},
    "zamba": _SHARED_STATES
    | {"layer_types": ["mamba", "hybrid", "hybrid"], "attention_hidden_size": 128, "mamba_dt_rank": 4},
    "zamba2": _SHARED_STATES
    | {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "use_shared_attention_adapter": False,
        "chunk_size": 8,
    },
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8},
    "olmo_hybrid": _DELTA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "bamba": _STATES | {"attn_layer_indices": [1]},
    "granitemoehybrid": _STATES | {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
}


def tiny(family: str, **more: Any) -> nn.Module:
    """The model in float64, its matrices drawn anew: a fresh model's are often too even to tell anything."""
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    known = {*inspect.signature(config_class.__init__).parameters, *dir(config_class())}
    sizes = {name: size for name, size in _SIZES.items() if name in known} | FAMILIES.get(family, {}) | more
    torch.manual_seed(0)
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    given = {name: size for name, size in sizes.items() if size is not None}
    model = getattr(transformers, named if isinstance(named, str) else named[0])(config_class(**given))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrix = parameter.ndim == 2 and isinstance(module, nn.Linear | nn.Embedding | Conv1D)
            if matrix or parameter.ndim == 3:
                nn.init.normal_(parameter, std=0.1)
    model.config._experts_implementation_internal = "eager"  # the grouped kernel takes no double precision
    return model.eval().double()


def folder(family: str, path: Path, **more: Any) -> Path:
    """A folder on disk as a trainer would save it, with a tokenizer that fits."""
    tokenizer = build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512, **ends, **more)
    model.float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
