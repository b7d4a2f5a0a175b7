"""What a mixture of experts should compute when it is rounded: written out in float64, one token and one expert at a
time, from what is known of each class and without a line of `fp4rl.inject`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection

# Read in the sources of transformers: who computes x @ W with W [experts, in, out]. All others hold [experts, out, in].
TRANSPOSED = ("GptOss", "Aria", "Llama4", "OpenAIPrivacyFilter")


def rounded(x: Tensor, fmt: Format | Callable[[Tensor], Tensor] | None) -> Tensor:
    """In float32, the dtype that the tests' injections round in; the gradient passes as if nothing were rounded."""
    if fmt is None:
        return x
    values = fmt(x.detach()) if callable(fmt) else fake_quantize(x.detach().float().contiguous(), fmt).double()
    return x + (values - x).detach()


def product(x: Tensor, weight: Any, injection: Injection, bias: Tensor | None = None) -> Tensor:
    """x [n, in] times weight [out, in]: weight and input in blocks along `in`, the output along `out`.

    Of a pair the second is what an adapter adds: to the weight where it is merged, else in an unrounded product.
    """
    own, added = weight if isinstance(weight, tuple) else (weight, None)
    if added is not None and injection.lora == "merged":
        own, added = own + added, None
    y = rounded(linear(rounded(x, injection.input), rounded(own, injection.weight), bias), injection.output)
    return y if added is None else y + linear(x, added)


def stored(module: nn.Module, name: str, expert: int) -> Any:
    """One expert's matrix as [out, in]; with an adapter (`module.adapters`: A, B, scaling) the pair of it and s B A."""
    weight, transposed = module._parameters[name][expert], type(module).__name__.startswith(TRANSPOSED)
    own = weight.T if transposed else weight
    if name not in getattr(module, "adapters", {}):
        return own
    a, b, scaling = module.adapters[name]
    count = len(module._parameters[name])
    rank = len(a) // count
    # peft keeps an expert's rows of A together and scatters its columns of B.
    added = b[:, expert::count] @ a[expert * rank : (expert + 1) * rank] * scaling
    # It reads a layout that no class declares as [experts, out, in].
    return own, added.T if transposed and not hasattr(module, "is_transposed") else added


def one_expert(module: nn.Module, expert: int, x: Tensor, injection: Injection) -> Tensor:
    """up (and gate), activation, down; biases and a norm behind them where the class has them."""
    biases = {name: bias[expert] for name, bias in module._parameters.items() if name.endswith("_bias")}
    up = "gate_up_proj" if "gate_up_proj" in module._parameters else "up_proj"
    h = product(x, stored(module, up, expert), injection, biases.get(f"{up}_bias"))
    if hasattr(module, "_apply_gate") and up == "gate_up_proj":
        h = module._apply_gate(h)
    elif up == "gate_up_proj":
        gate, linear_part = h.chunk(2, -1)
        h = module.act_fn(gate) * linear_part
    else:
        h = module.act_fn(h)
    y = product(h, stored(module, "down_proj", expert), injection, biases.get("down_proj_bias"))
    return module.post_expert_norm(y) if hasattr(module, "post_expert_norm") else y


def routed(module: nn.Module, x: Tensor, chosen: Tensor, share: Tensor, injection: Injection) -> Tensor:
    """sum over a token's experts of share times what the expert makes of it; LongCat's last experts are identities."""
    count, y = module._parameters["down_proj"].shape[0], []
    for token, experts in enumerate(chosen.tolist()):
        own = x[token : token + 1]
        made = [own if e >= count else one_expert(module, e, own, injection) for e in experts]
        y.append(sum(share[token, place] * one for place, one in enumerate(made)))
    return torch.cat(y)


def in_bands(module: nn.Module, x: Tensor, injection: Injection) -> Tensor:
    """Llama-4: the rows come sorted, as many for every expert."""
    bands = x.view(module.gate_up_proj.shape[0], -1, x.shape[-1])
    made = []
    for expert, band in enumerate(bands):
        gate, up = product(band, stored(module, "gate_up_proj", expert), injection).chunk(2, -1)
        made.append(product(up * module.act_fn(gate), stored(module, "down_proj", expert), injection))
    return torch.cat(made)


def parallel(module: nn.Module, x: Tensor, sizes: list[int], injection: Injection) -> Tensor:
    """JetMoe: one matrix an expert, and how many rows each gets."""
    parts = x.split(sizes)
    return torch.cat([product(p, stored(module, "weight", e), injection) for e, p in enumerate(parts) if len(p)])


def shared(module: nn.Module, x: Tensor, shares: Tensor, injection: Injection) -> Tensor:
    """Inkling's shared experts: every token goes through all, weighted before the last product."""
    flat, y = x.reshape(-1, x.shape[-1]), 0
    for expert in range(module._parameters["down_proj"].shape[0]):
        gate = product(flat, stored(module, "gate_proj", expert), injection)
        up = product(flat, stored(module, "up_proj", expert), injection)
        h = module.act_fn(gate) * up * shares.reshape(-1, shares.shape[-1])[:, expert, None]
        y = y + product(h, stored(module, "down_proj", expert), injection)
    return y.view(x.shape)


def oracle(module: nn.Module, args: tuple, injection: Injection) -> Tensor:
    """What the module should return for these arguments."""
    ways = {"Llama4TextExperts": in_bands, "InklingSharedExperts": shared}
    ways |= dict.fromkeys(("JetMoeParallelExperts", "GraniteMoeParallelExperts"), parallel)
    return ways.get(type(module).__name__, routed)(module, *args, injection)


def oracle_model(model: nn.Module, injection: Injection) -> nn.Module:
    """A copy in float64 in which every linear layer and every experts module computes as written here, routers and the
    head as ever."""
    twin = copy.deepcopy(model).double()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not (
            "router" in name or name.endswith(("lm_head", ".gate", "_expert_gate"))
        ):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            module.forward = partial(_linear, weight, module.bias, injection)
        elif type(module).__name__.endswith(("Experts", "NaiveMoe")):  # the second before transformers 5.11
            module.forward = partial(_experts, module, injection)
    return twin


def _linear(weight: Tensor, bias: Tensor | None, injection: Injection, x: Tensor) -> Tensor:
    return product(x, weight, injection, bias)


def _experts(module: nn.Module, injection: Injection, *args: Any) -> Tensor:
    return oracle(module, args, injection)
