"""SmoothQuant: scales that move the size of channels from inputs into the weights that they meet.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)      X_j / s_j,   W_j s_j      (arXiv 2211.10438, eq. 4)

The division is put into whatever makes X_j linearly: a norm's weight, the rows of `up_proj`, those of `v_proj`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp4rl.models.transforms.structure import Heads, structure_of
from fp4rl.sites.observe import observe
from fp4rl.spec.transforms import Smooth


@torch.no_grad()
def smooth(model: Any, spec: Smooth, rows: Sequence[Sequence[int]]) -> None:
    """Scale channels of a causal model in place by the inputs that `rows` of token ids make; `norm` comes last.

    Raises InvalidValueError for a model whose structure is not known.
    """
    structure = structure_of(model)
    by_norm = {
        path: sites
        for path, sites in structure.readers.items()
        if "norm" in spec.pairs and all(site.role != "lm_head" for site in sites)
    }
    heads = list(structure.heads()) if "o" in spec.pairs else []
    gated = list(structure.gated()) if "down" in spec.pairs else []
    read = [sites[0].path for sites in by_norm.values()]
    largest = _largest_inputs(model, [*read, *(own.o_path for own in heads), *(path for *_, path in gated)], rows)
    for own in heads:
        _smooth_heads(own, largest[own.o_path], spec.alpha)
    for up, down, path in gated:
        scales = _scales(largest[path], down.weight.abs().amax(0), spec.alpha)
        down.weight.mul_(scales)
        up.weight.div_(scales[:, None])
        if up.bias is not None:
            up.bias.div_(scales)
    for path, sites in by_norm.items():
        readers = [structure.linear(site) for site in sites]
        weights = torch.stack([linear.weight.abs().amax(0) for linear in readers]).amax(0)
        scales = _scales(largest[sites[0].path], weights, spec.alpha)
        model.get_submodule(path).weight.div_(scales)
        for linear in readers:
            linear.weight.mul_(scales)


def _smooth_heads(heads: Heads, largest: Tensor, alpha: float) -> None:
    """Scale values by head; query heads that share a value share its scale."""
    inputs, weights = (heads.by_head(each).amax(-2) for each in (largest, heads.o.weight.abs().amax(0)))
    scales = _scales(inputs, weights, alpha)  # [kv_heads, width]
    heads.o.weight.copy_((heads.by_head(heads.o.weight) * scales[:, None]).flatten(1))
    heads.v.weight.div_(scales.flatten()[:, None])
    if heads.v.bias is not None:
        heads.v.bias.div_(scales.flatten())


def _scales(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return s of every channel, in the dtype of the weights; 1 where a channel holds nothing but zeros."""
    scales = inputs.double() ** alpha / weights.double() ** (1 - alpha)
    return scales.masked_fill((inputs == 0) | (weights == 0), 1.0).to(weights.dtype)


def _largest_inputs(model: Any, paths: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Return path -> the largest magnitude of every channel [in] of a module's input."""
    largest: dict[str, Tensor] = {}

    def look(path: str, x: Tensor) -> None:
        now = x.abs().amax(0)
        largest[path] = torch.maximum(largest[path], now) if path in largest else now

    device = model.get_input_embeddings().weight.device
    with observe(model, paths, on_input=look):
        for row in rows:
            model(input_ids=torch.tensor([row], device=device), use_cache=False)
    return largest
