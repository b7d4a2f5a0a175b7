"""Tiny models with random weights, of families that need more than a few sizes: multimodal ones, and mixtures."""

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

TEXT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"intermediate_size": 96, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEEING = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "depth": 4}
TOKENS = {f"{name}_token_id": 150 + n for n, name in enumerate(("image", "video", "vision_start", "vision_end"))}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
GEMMA_SEEING = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
MULTIMODAL = {
    "Gemma3": {
        "text_config": TEXT,
        "vision_config": GEMMA_SEEING | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 150,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": SEEING | {"fullatt_block_indexes": [1]},
        **TOKENS,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": SEEING | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **TOKENS,
    },
}
# Mixtures that see; Llama-4's text model, head and all, stands one level deeper.
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}
LLAMA_SEEING = GEMMA_SEEING | {"image_size": 28, "patch_size": 14, "vision_output_dim": 64, "intermediate_size": 64}
MULTIMODAL_MIXTURES = {
    "Qwen3VLMoe": MULTIMODAL["Qwen3VL"] | {"text_config": MULTIMODAL["Qwen3VL"]["text_config"] | EXPERTS},
    "Llama4": {
        "text_config": TEXT | LLAMA,
        "vision_config": LLAMA_SEEING | {"projector_input_dim": 64, "projector_output_dim": 64},
        "image_token_index": 150,
    },
}


def multimodal(family, **text):
    """A model with a tower that sees; `text` are sizes of its text model."""
    torch.manual_seed(0)
    sizes = (MULTIMODAL | MULTIMODAL_MIXTURES)[family]
    sizes = sizes | {"text_config": sizes["text_config"] | text}
    model = getattr(transformers, f"{family}ForConditionalGeneration")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def experts_in(family, device="meta", vocab=64):
    """A tiny Qwen3-MoE or other mixture."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_local_experts": 4, "vocab_size": vocab}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
