"""Warnings before a run under noise: weights that the model does not have, and noise that BF16 swallows."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from fp4rl.noise.schedule import asked_sigma, share_bf16_can_change
from fp4rl.noise.targets import noisy_weights
from fp4rl.spec.noise import Noise

_SWALLOWED = 0.05  # less than this share of the values can change
_VALUES = 1024  # of each weight
_STEPS = 24  # of a smooth schedule; a staged one has hardly more


def noise_warnings(model: nn.Module, noise: Noise, total: int) -> Iterator[str]:
    """Yield one line for everything that should be known before a run of `total` steps."""
    if noise.control == "sigma_zero":
        return
    weights = noisy_weights(model, noise, share=0.0)
    if noise.precision != "weight" or any(weight.parameter.dtype != torch.bfloat16 for weight in weights):
        return
    by_factor: dict[tuple[float, float], Counter[float]] = defaultdict(Counter)
    for weight in weights:
        flat = weight.parameter.detach().reshape(-1)
        by_factor[weight.multiplier, weight.offset].update(flat[:: max(1, flat.numel() // _VALUES)].float().tolist())
    planned = {asked_sigma(noise, step, total) for step in range(0, total, max(1, total // _STEPS))}
    sigmas = sorted(sigma for sigma in planned if sigma > 0)
    shares = {sigma: _share(by_factor, sigma, noise) for sigma in sigmas}
    lost = [sigma for sigma in sigmas if shares[sigma] < _SWALLOWED]
    if lost:
        how = "all of its noise" if len(lost) == len(sigmas) else f"its noise from sigma {lost[-1]:.4g} down"
        yield (
            f"noise: bfloat16 will swallow {how}: at most {shares[lost[-1]]:.1%} of the values can change there; "
            "take noise.precision: float32"
        )


def without_effect(model: nn.Module, noise: Noise) -> Iterator[str]:
    """Yield a line for every setting about norms that this model does not have."""
    for key in ("qk_norms", "moe"):
        usual = type(noise.targets).model_fields[key].default
        if getattr(noise.targets, key) == usual:
            continue
        targets = noise.targets.model_copy(update={key: usual})
        without = noisy_weights(model, noise.model_copy(update={"targets": targets}), share=0.0)
        if [weight.name for weight in without] == [weight.name for weight in noisy_weights(model, noise, share=0.0)]:
            what = "norms of queries and keys" if key == "qk_norms" else "norms around experts"
            yield f"noise.targets.{key} cannot act: {type(model).__name__} has no {what} that it would choose"


def _share(by_factor: dict[tuple[float, float], Counter[float]], sigma: float, noise: Noise) -> float:
    total = sum(values.total() for values in by_factor.values())
    changed = (
        values.total() * share_bf16_can_change(values, sigma * factor, noise.operation, offset)
        for (factor, offset), values in by_factor.items()
    )
    return sum(changed) / total
