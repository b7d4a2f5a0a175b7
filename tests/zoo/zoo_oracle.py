"""What a rounded model computes, in float64, without a line of fp4rl: formats, linear layers, experts, caches."""

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import expert_oracle
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

Rounding = Callable[[Tensor], Tensor]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def onto_e2m1(x: Tensor) -> Tensor:
    """To the nearest of the sixteen values, ties to the even code, 6 where it is beyond."""
    size = x.abs().clamp(max=6.0).contiguous()
    above = torch.searchsorted(_E2M1, size).clamp(max=7)
    below = (above - 1).clamp(min=0)
    up, down = _E2M1[above] - size, size - _E2M1[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return _E2M1[code] * x.sign()


def onto_e4m3(x: Tensor) -> Tensor:
    """To the nearest value of torch's float8_e4m3fn, 448 where it is beyond."""
    return x.clamp(-448.0, 448.0).float().to(torch.float8_e4m3fn).double()


def _blocks(x: Tensor, size: int) -> Tensor:
    return nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _mx(x: Tensor, onto: Rounding, largest_exponent: int) -> Tensor:
    """OCP MX v1.0, 6.3: 32 values under the power of two 2^(floor(log2 amax) - largest_exponent)."""
    blocks = _blocks(x.float().double(), 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(torch.where(amax > 0, amax, 1.0)).exponent - 1 - largest_exponent
    scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(-127, 127))
    return (onto(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def mxfp4(x: Tensor) -> Tensor:
    return _mx(x, onto_e2m1, 2)


def mxfp8(x: Tensor) -> Tensor:
    return _mx(x, onto_e4m3, 8)


def nvfp4(x: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensor:
    """16 values under an E4M3 scale, all of them under one FP32 factor 448 * 6 / amax, as compressed-tensors has it;
    amax is also that of the matrices that are served in one with it."""
    wide = x.float()
    amax = torch.stack([matrix.detach().float().abs().max() for matrix in (x, *beside)]).max()
    factor = amax.reciprocal() * (448.0 * 6.0)
    blocks = _blocks(wide, 16)
    scale = onto_e4m3((factor * (blocks.abs().amax(-1, keepdim=True) / 6.0)).double()).float() / factor
    quotient = torch.where(scale > 0, blocks / torch.where(scale > 0, scale, 1.0), 0.0)
    return (onto_e2m1(quotient.double()).float() * scale).double().flatten(-2)[..., : x.shape[-1]]


@dataclass(frozen=True)
class Rounded:
    """What is rounded, and how; named as an injection names its points."""

    weight: Rounding | None = None
    input: Rounding | None = None
    output: None = None
    cache: Rounding | None = None
    fused: bool = False  # the factor of a weight is that of all that are served in one matrix


MODES = {
    "w4a16": Rounded(mxfp4),
    "w4a8": Rounded(mxfp4, mxfp8),
    "w4a4": Rounded(mxfp4, mxfp4),
    "nvfp4_w4a16": Rounded(nvfp4, fused=True),
    "kv_cache": Rounded(cache=mxfp4),
}


def rounded_cache(model: nn.Module) -> DynamicCache:
    """A cache of the class that the model asks for, which stores what it is given rounded per head and token."""
    own = vars(sys.modules[type(model).__module__]).values()
    kinds = [kind for kind in own if isinstance(kind, type) and issubclass(kind, DynamicCache)]
    kind = next((kind for kind in kinds if kind is not DynamicCache), DynamicCache)

    class Rounded(kind):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().update(mxfp4(key_states), mxfp4(value_states), *args, **kwargs)

    return Rounded() if kind is not DynamicCache else Rounded(config=model.config)


_AS_EVER = re.compile(r"router|(^|\.)gate(\.wg)?$|shared_expert_gate|lm_head|lora_|mixer\.dt_proj$|mamba\.dt_proj$")
# Read in the sources of transformers: what computes queries, keys and values of one input, or gate and up of one.
_SERVED_IN_ONE = (("q_proj", "k_proj", "v_proj"), ("Wq", "Wk", "Wv"), ("gate_proj", "up_proj"), ("w1", "w3"))


def twin(model: nn.Module, mode: Rounded) -> nn.Module:
    """A copy in which every linear layer and every experts module computes as written here; routers, the head and the
    step size of a state space compute as ever."""
    copied = copy.deepcopy(model).double()
    head = copied.get_output_embeddings()
    beside = _beside(copied) if mode.fused else {}
    for name, module in copied.named_modules() if mode.weight else ():
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _AS_EVER.search(name):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            others = beside.get(module)
            own = replace(mode, weight=partial(mode.weight, beside=others)) if others else mode
            module.forward = partial(expert_oracle._linear, weight, module.bias, own)
        elif type(module).__name__.endswith("Experts"):  # an expert's gate and up are one matrix
            module.forward = partial(expert_oracle._experts, module, mode)
    return copied


def _beside(model: nn.Module) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Linear layer -> the weights that are served in one matrix with its own."""
    found = {}
    for parent in model.modules():
        for names in _SERVED_IN_ONE:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), nn.Linear)]
            found |= {layer: tuple(other.weight for other in layers if other is not layer) for layer in layers}
    return found
