"""How far rounding takes a policy from itself: KL over the vocabulary at every token of the answers it gave.

At each token t of the answers that the rounded policy q gave, both are asked for their next token (temperature 1):

    KL(p || q) = sum over v of p(v | prompt, answer before t) * ln(p(v | ...) / q(v | ...))

with p the same weights without any rounding: the direction of `fp4rl scan` and of `llama-perplexity --kl-divergence`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.inject.attach import Attachment
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.generate import Generation, Sampler, Sampling, dropout_off
from fp4rl.rl.prompts import padded
from fp4rl.sites.observe import require_finite_rows

_LOGITS = 2**28  # of one forward: 1 GiB in float32
_EXACT = 2**24  # of them in float64 at once

OnRows = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Divergence:
    """KL(unrounded || rounded) in nats, and the share of tokens whose likeliest next token is the same; both are means
    over `tokens`."""

    kl: float
    same_top: float
    tokens: int


@dataclass(frozen=True)
class Kept:
    """A sampler that keeps what it answered: token ids of (prompt, answer), an entry an answer."""

    sampler: Sampler
    rows: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
    ) -> list[Generation]:
        """Return what the sampler answers."""
        answers = self.sampler(model, tokenizer, prompts, sampling)
        repeated = (prompt for prompt in prompts for _ in range(sampling.count))
        self.rows.extend((prompt, answer.tokens) for prompt, answer in zip(repeated, answers, strict=True))
        return answers


@torch.no_grad()
def divergence(
    model: PreTrainedModel,
    attachment: Attachment | None,
    rows: Sequence[tuple[list[int], list[int]]],
    most: int,
    on_rows: OnRows = lambda *_: None,
) -> Divergence | None:
    """Compare the policy, rounded as now, with itself unrounded on `rows` of (prompt, answer); None without a token.

    Takes two forwards of each row, `most` rows at once; without an attachment both are one policy, and none is needed.
    Raises NotFinite for logits that are no numbers.
    """
    tokens = sum(len(answer) for _, answer in rows)
    if attachment is None or not tokens:
        return Divergence(0.0, 1.0, tokens) if tokens else None
    kl = same = 0.0
    # Errors may draw from torch's global generator; forked, so that a comparison never moves another's randomness.
    with dropout_off(model), torch.random.fork_rng():
        for done, chosen in _batches(rows, most, model.config.get_text_config().vocab_size):
            with attachment.off():
                unrounded = _answer_logits(model, chosen)
            rounded = _answer_logits(model, chosen)
            same += int((unrounded.argmax(-1) == rounded.argmax(-1)).sum())
            size = max(1, _EXACT // unrounded.shape[-1])
            for p, q in zip(torch.split(unrounded, size), torch.split(rounded, size), strict=True):
                ours, theirs = log_softmax(q.double(), -1), log_softmax(p.double(), -1)
                kl += float(kl_div(ours, theirs, reduction="sum", log_target=True))
            on_rows(done, len(rows))
    return Divergence(max(kl, 0.0) / tokens, same / tokens, tokens)


def _batches(
    rows: Sequence[tuple[list[int], list[int]]], most: int, vocabulary: int
) -> Iterator[tuple[int, list[tuple[list[int], list[int]]]]]:
    """Yield (rows so far, rows of similar length), so many that their logits fit into memory."""
    batch: list[tuple[list[int], list[int]]] = []
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    for done, row in enumerate(ordered):
        if batch and (len(batch) == most or (len(batch) + 1) * (len(row[0]) + len(row[1])) * vocabulary > _LOGITS):
            yield done, batch
            batch = []
        batch.append(row)
    yield len(ordered), batch


def _answer_logits(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Return the logits [answer tokens, vocabulary] from which each token of the answers was chosen."""
    ids, mask = (part.to(next(model.parameters()).device) for part in padded([p + a for p, a in rows], 0))
    run = partial(model, **forward_inputs(model, ids, mask), use_cache=False)
    # Padded on the left, an answer of n tokens is the last n, and each is chosen one position earlier.
    to_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
    lengths = torch.tensor([len(answer) for _, answer in rows], device=ids.device)
    chosen = (to_end > 1) & (to_end <= lengths[:, None] + 1)
    logits: Tensor = run().logits[chosen]
    require_finite_rows(logits, "logits", model, run)
    return logits
