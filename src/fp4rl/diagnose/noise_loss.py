"""The effect of noise alone on the loss of a quantized model: the cheapest test of a noise strategy, no training."""

from collections.abc import Mapping

import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.passes import Progress, reference_of, tracked
from fp4rl.inject.attach import attach
from fp4rl.noise.perturb import perturb
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise


def noise_losses(
    model: nn.Module,
    injection: Injection | None,
    noises: Mapping[str, Noise | None],
    calibration: Calibration,
    *,
    sigma: float,
    draws: int,
    on_progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Return name -> the loss of each draw, under `injection` as in a rollout and noise of `sigma` x multiplier.

    Losses are in nats per token that the calibration counts. Draw d uses the same numbers for every name, so that
    differences between names are paired; an arm without noise has one loss, repeated. The model is not changed.
    """
    if draws < 2:
        raise InvalidValueError(f"{draws} draws have no spread; take at least 2, better 20")
    losses: dict[str, list[float]] = {name: [] for name in noises}
    with attach(model, injection or Injection()) as attachment:
        attachment.set_phase("rollout")
        for draw in tracked(range(draws), on_progress):
            for name, noise in noises.items():
                if noise is None:
                    losses[name].append(losses[name][0] if draw else _loss(model, calibration))
                    continue
                generator = torch.Generator().manual_seed(draw)
                with perturb(model, noise, sigma, generator=generator, share=0.0):
                    attachment.invalidate()
                    losses[name].append(_loss(model, calibration))
                attachment.invalidate()
    return losses


def _loss(model: nn.Module, calibration: Calibration) -> float:
    counts = [int(batch.predicted.sum()) for batch in calibration.batches]
    losses = [reference_of(model, batch).loss for batch in calibration.batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
