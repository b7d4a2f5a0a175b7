"""Score answers that are there already, as the sampler computed them: the whole model, dropout off.

Dropout acts where a policy learns and nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.models.positions import forward_inputs


def whole_sequences(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Put prompts and answers side by side: ids and attention mask, [rows, P + T] both."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def answer_logps(
    model: Any, ids: Tensor, mask: Tensor, width: int, *, rows: int, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Score the last `width` tokens of `ids` [n, P + T] in one pass per `rows` sequences.

    `model` has TRL's fused head, which divides by the temperature. Returns log-probabilities [n, width] and, if asked,
    the entropies of the distributions they come from; both 0 in the padding.
    """
    logps, entropies = [], []
    for these, real in zip(torch.split(ids, rows), torch.split(mask, rows), strict=True):
        labels = these.masked_fill(real == 0, -100)
        labels[:, :-width] = -100
        output = model(**forward_inputs(model, these, real), labels=labels, fused_lm_head=True)
        logps.append(output.log_probs[:, -width:])
        if entropy:
            entropies.append(output.entropy[:, -width:])
    return torch.cat(logps), torch.cat(entropies) if entropy else None


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
