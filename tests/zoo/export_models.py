"""Small folders as a trainer saves them, whose widths every packed layout takes, and the logits of a model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.models.tokenizer import build_tokenizer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "head_dim": 16, "initializer_range": 0.2, "bos_token_id": None}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128},
}


def folder_of(family, path, dtype=torch.float32, shard="1GB", *, biased=False, **more):
    """A folder as a trainer would save it; `biased`: biases and norms are no zeros and ones."""
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SIZES | FAMILIES.get(family, {}) | ids | {"vocab_size": len(tokenizer)} | more
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, weight in model.named_parameters() if biased else ():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    model.save_pretrained(path, max_shard_size=shard)
    tokenizer.save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(2, 6)).logits
