"""Run by test_sharding.py under torchrun: the weight stream of sharded models against that of one process.

    python streamed.py OUT

Writes, for every case, the names of tensors that differ in any process, and whether a missed refresh was found.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.noise.perturb import perturb
from fp4rl.rl import processes
from fp4rl.rl.lora import with_lora
from fp4rl.rl.sharding import shard, whole
from fp4rl.rl.stream import weight_stream
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Lora
from fp4rl.spec.noise import Noise

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 96, "vocab_size": 61, "initializer_range": 0.2, "num_local_experts": 3, "num_experts": 3}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
FUSED = {"name": "nvfp4", "factor": "fused"}
CASES = {
    "dense": ("qwen2", {"weight": "mxfp4"}, None),
    "blocks of rows": ("qwen2", {"weight": "mxfp4_2d"}, None),
    "one factor a group": ("qwen2", {"weight": FUSED}, None),
    "tied": ("qwen3", {"weight": "mxfp4"}, {"tie_word_embeddings": True}),
    "mixture": ("qwen3_moe", {"weight": "mxfp4"}, None),
    "stacks on their side": ("gpt_oss", {"weight": "mxfp4"}, None),
    "transposed": ("gpt2", {"weight": "mxfp4"}, None),
    "adapter": ("qwen2", {"weight": "mxfp4"}, {"lora": "adapter"}),
    "merged": ("qwen2", {"weight": "mxfp4", "lora": "merged"}, {"lora": "merged"}),
    "unrounded": ("qwen2", {"weight": None}, None),
}


def made(family, special):
    torch.manual_seed(0)
    sizes = {**SIZES, "n_embd": 64, "n_head": 4, "n_layer": 2} if family == "gpt2" else SIZES
    tied = bool((special or {}).get("tie_word_embeddings"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, tie_word_embeddings=tied)).eval()
    if "lora" in (special or {}):
        model = with_lora(model, Lora(rank=4, alpha=8.0), "nowhere").eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
    return model


def streamed(model, attachment):
    attachment.set_phase("rollout")
    with perturb(model, Noise(), 0.1, generator=torch.Generator().manual_seed(0)):
        return {name: tensor.clone() for name, tensor in weight_stream(model)}


def missed_refresh(model, attachment):
    """Whether rounded copies that are older than their weights are found, in the middle of a rollout."""
    with whole(model, attachment), torch.no_grad():
        model(input_ids=torch.arange(3, 15).view(2, 6))
        for module in attachment.modules:
            layer = getattr(module, "get_base_layer", lambda module=module: module)()
            for weight in layer._parameters.values():
                if weight is not None and weight.dim() > 1:
                    weight.data.view(-1)[1] *= 4  # not in the sample that the copies are compared with
        try:
            require_rounded(attachment)
        except CheckFailed:
            return True
    return False


def case(family, injection, special):
    injection = Injection.model_validate(injection)
    alone = made(family, special)
    wanted = streamed(alone, attach(alone, injection))
    model = made(family, special)
    attachment = attach(model, injection)
    shard(model)
    parts = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    ours = streamed(model, attachment)
    with whole(model, attachment):
        held = streamed(model, attachment)
    return {
        "names": list(ours) == list(wanted),
        "differ": [n for n in wanted if n not in ours or not torch.equal(ours[n], wanted[n])],
        "differ_whole": [n for n in wanted if n not in held or not torch.equal(held[n], wanted[n])],
        "share": parts / sum(p.numel() for p in alone.parameters()),
        "refresh_found": injection.weight is None or missed_refresh(model, attachment),
    }


def main(out):
    torch.set_num_threads(1)
    found = {}
    for name, described in CASES.items():
        try:
            found[name] = case(*described)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    each = processes.from_all(found)
    if processes.is_first():
        out.write_text(json.dumps(each))
    processes.wait()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
