"""Dropout acts where a policy learns and nowhere else: an answer is sampled from, and scored by, the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, and afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def drops(model: nn.Module) -> bool:
    """Tell whether `model` leaves anything to chance while it learns, by running it once in training mode.

    What draws random numbers need not be a dropout layer: OPT calls the function, some models skip whole layers or
    jitter a router. The generators are left as they were.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.train()
    with torch.random.fork_rng():
        before = _random_state(device)
        try:
            model(input_ids=torch.ones(1, 8, dtype=torch.long, device=device), use_cache=False)
        finally:
            model.train(was_training)
        return not torch.equal(before, _random_state(device))


def _random_state(device: torch.device) -> Tensor:
    """States of the CPU's generator and the device's own, which is where dropout draws from."""
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)
