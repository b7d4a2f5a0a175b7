"""One forward pass over a batch, and the divergence of two of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fp4rl.diagnose.calibration import Batch
from fp4rl.models.positions import forward_inputs
from fp4rl.sites.observe import require_finite_rows

T = TypeVar("T")
Progress = Callable[[int, int], None]  # done, total


def tracked(items: Sequence[T], on_progress: Progress | None) -> Iterator[T]:
    """Yield each item, and report after each how many are done."""
    for done, item in enumerate(items, start=1):
        yield item
        if on_progress is not None:
            on_progress(done, len(items))


@dataclass(frozen=True)
class Divergence:
    """Difference of an output to that of the unchanged model: KL and change of the loss, in nats per token."""

    kl: float
    loss_change: float

    def __sub__(self, other: "Divergence") -> "Divergence":
        return Divergence(self.kl - other.kl, self.loss_change - other.loss_change)


@dataclass(frozen=True)
class Reference:
    """The unchanged model on one batch: log-probabilities [tokens, vocabulary] without padding, and its loss."""

    log_probs: Tensor
    loss: float


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits [batch, time, vocabulary] in the model's dtype. Raises NotFinite where a real token has none."""
    device = next(model.parameters()).device
    # A key-value cache would grow with every probe that calls a layer again.
    options = {"use_cache": False} if hasattr(model, "config") else {}
    run = partial(model, **forward_inputs(model, batch.ids.to(device), batch.mask.to(device)), **options)
    output: Any = run()
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    require_finite_rows(logits[batch.mask.bool().to(device)], "logits", model, run)
    return logits


@torch.no_grad()
def reference_of(model: nn.Module, batch: Batch) -> Reference:
    """Run the model as it is now, as the reference of comparisons."""
    logits = logits_of(model, batch)
    return Reference(_log_probs(logits, batch), _loss(logits, batch))


@torch.no_grad()
def divergence_of(model: nn.Module, batch: Batch, reference: Reference) -> Divergence:
    """Return the divergence of the present model from `reference`: KL(reference || now), averaged over tokens."""
    logits = logits_of(model, batch)
    now = _log_probs(logits, batch)
    kl = kl_div(now, reference.log_probs, reduction="sum", log_target=True) / len(now)
    return Divergence(float(kl), _loss(logits, batch) - reference.loss)


def weighted(divergences: list[Divergence], weights: list[int]) -> Divergence:
    """Return the average over batches, weighted by their tokens."""
    total = sum(weights)
    pairs = list(zip(divergences, weights, strict=True))
    return Divergence(sum(h.kl * w for h, w in pairs) / total, sum(h.loss_change * w for h, w in pairs) / total)


def _log_probs(logits: Tensor, batch: Batch) -> Tensor:
    return log_softmax(logits[batch.mask.bool().to(logits.device)].float(), -1)


def _loss(logits: Tensor, batch: Batch) -> float:
    """Return the cross-entropy of the next token, over those that the loss counts."""
    mask = batch.predicted.to(logits.device)
    if not bool(mask.any()):
        return 0.0
    return float(cross_entropy(logits[:, :-1][mask].float(), batch.ids[:, 1:].to(logits.device)[mask]))
