"""What vLLM 0.32 computes otherwise than the model does: mended where that is a line, else refused by name."""

from typing import Any

import torch
from torch import nn

from fp4rl.spec.errors import InvalidValueError

_ROUTES = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def require_routes(config: Any) -> None:
    """Raise InvalidValueError for a config from which vLLM would route tokens otherwise than transformers does.

    transformers knows one router of DeepSeek-V3 and reads neither key; vLLM takes others where they are missing.
    """
    if getattr(config, "model_type", None) == "deepseek_v3":
        for key, value in _ROUTES.items():
            if getattr(config, key, None) != value:
                raise InvalidValueError(
                    f"rollout.engine vllm routes deepseek_v3 otherwise where config.json does not say {key}: {value}; "
                    "write it there, or take transformers"
                )


def prepare(module: nn.Module) -> None:
    """Let vLLM's model compute what it is to compute on a CPU; InvalidValueError for what it cannot."""
    require_routes(getattr(module, "config", None))
    if next(module.parameters()).device.type != "cpu":
        return
    from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
    from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

    for each in module.modules():
        layer: Any = each
        if isinstance(layer, MultiHeadLatentAttentionWrapper) and layer.rotary_emb is not None:
            # its kernel for CPUs takes [tokens, heads, size] for [tokens, size]
            layer.rotary_emb._forward_method = layer.rotary_emb.forward_native
        if isinstance(layer, GatedDeltaNetAttention) and layer.conv1d.weight.dtype != torch.bfloat16:
            raise InvalidValueError(
                f"rollout.engine vllm: {type(module).__name__} has linear attention, which vLLM computes in bfloat16 "
                "alone on a CPU; take model.dtype: bfloat16, or transformers"
            )
