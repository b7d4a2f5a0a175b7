"""Modules of stacked experts of every kind, with random weights, and what they are called with."""

import importlib
from types import SimpleNamespace

import torch
from torch import nn

EXPERTS, TOKENS = 4, 8
# (hidden, intermediate): gate and up together are [4, 64, 64] in the last, down is in the second.
SIZES = ((64, 96), (64, 64), (64, 32))


class Config(SimpleNamespace):
    """Every name under which a class of experts asks for its sizes; None for what it may do without."""

    def __getattr__(self, name):
        if name.startswith("__") or name == "get_text_config":
            raise AttributeError(name)


def config(hidden, inner):
    words = {
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), hidden),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), inner),
        **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size"), inner),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
        **dict.fromkeys(("mlp_gate_softcap", "mlp_up_softcap"), 20.0),
        "n_shared_experts": 2,
        "zero_expert_num": 1,
        "mlp_hidden_act": "relu2",
        "ffn_act_fn": {"name": "silu"},
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.7,
        "post_norm_eps": 1e-6,
        "_experts_implementation": "eager",
    }
    return Config(**words)


def experts_of(family, name, sizes):
    """A module of that class with random weights."""
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    torch.manual_seed(0)
    module = kind(EXPERTS, *sizes) if name == "JetMoeParallelExperts" else kind(config(*sizes))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def arguments(name, hidden):
    """Tokens, and where they go; one expert in two gets none in some cases."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, dtype=torch.float64, generator=generator)
    shares = torch.rand(TOKENS, 2, dtype=torch.float64, generator=generator)
    if name == "Llama4TextExperts":
        return (x,)
    if name == "JetMoeParallelExperts":
        return x, [3, 0, 4, 1]
    if name == "InklingSharedExperts":
        return x.view(2, 4, hidden), shares.view(2, 4, 2)
    return x, torch.tensor([[0, 1], [2, 0], [1, 0], [2, 1], [0, 2], [1, 2], [0, 1], [2, 0]]), shares


def rooted(module, hidden):
    """A model of one module, as a walk finds it."""
    model = nn.ModuleDict({"experts": module})
    model.config = Config(hidden_size=hidden)
    return model


def ways(module):
    """The implementations that a class knows."""
    return ("eager", "grouped_mm", "batched_mm") if hasattr(module, "is_transposed") else ("eager",)


KINDS = {
    "linear": ("qwen3_moe", "Qwen3MoeExperts"),
    "@, declared": ("aria", "AriaExperts"),
    "@ with biases": ("gpt_oss", "GptOssExperts"),
    "bmm, undeclared": ("llama4", "Llama4TextExperts"),
    "bmm of a transposed read": ("inkling", "InklingSharedExperts"),
    "one matrix a module": ("jetmoe", "JetMoeParallelExperts"),
    "identity experts": ("longcat_flash", "LongcatFlashExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
}


class Hidden(nn.Module):
    """Experts in a product that nothing meets; square on demand."""

    def __init__(self, inner=96, declared=None):
        super().__init__()
        self.hidden_size = 64
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 64, inner))
        if declared is not None:
            self.is_transposed = declared

    def forward(self, x):
        return torch.einsum("ti,eio->teo", x, self.gate_up_proj)


class Plain(Hidden):
    """The same by `@`."""

    def forward(self, x):
        return torch.stack([x @ weight for weight in self.gate_up_proj])
