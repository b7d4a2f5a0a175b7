"""Further calls of an engine under audit: the same prompts in another order, and under other weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.engines.parity.scores import drawn, scored
from fp4rl.rl.generate import Generation, Sampler, Sampling

Pairs = tuple[list[Tensor], list[Tensor]]
"""Two scorings of the same tokens, answer by answer."""

ALONE = 4  # prompts that are also answered one by one
_SCALE = 1.05  # what norms are multiplied by, in place of a training step


def in_other_orders(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    new_tokens: int,
) -> dict[str, Pairs]:
    """Return greedy scores of all prompts at once beside those in the other order, once more, and of a few alone."""
    greedy = Sampling(new_tokens, 0.0, logps=True)
    together = sampler(model, tokenizer, prompts, greedy)
    ways = {
        "reversed": sampler(model, tokenizer, prompts[::-1], greedy)[::-1],
        "again": sampler(model, tokenizer, prompts, greedy),
        "alone": [sampler(model, tokenizer, [prompt], greedy)[0] for prompt in prompts[:ALONE]],
    }
    return {name: _alike(together, answers) for name, answers in ways.items()}


def with_scaled_norms(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
) -> Pairs:
    """Return an engine's scores of prompts that it has answered before beside the model's own, with scaled norms."""
    with _norms_scaled(model):
        answers = sampler(model, tokenizer, prompts, sampling)
        return [drawn(answer) for answer in answers], scored(model, prompts, answers, tokenizer)


@contextmanager
def _norms_scaled(model: PreTrainedModel) -> Iterator[None]:
    """Scale the norms (of a model without any, the embedding) for a while; they come back bit for bit."""
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    kept = {parameter: parameter.detach().clone() for parameter in vectors or [model.get_input_embeddings().weight]}
    for parameter in kept:
        parameter.mul_(_SCALE)
    try:
        yield
    finally:
        for parameter, before in kept.items():
            parameter.copy_(before)


def _alike(first: Sequence[Generation], other: Sequence[Generation]) -> Pairs:
    """Return the log-probabilities of answers up to where they part: from there on they are of other texts."""
    pairs = [(_agreeing(a, b), a, b) for a, b in zip(first, other, strict=False)]
    return [drawn(a)[:count] for count, a, _ in pairs], [drawn(b)[:count] for count, _, b in pairs]


def _agreeing(first: Generation, other: Generation) -> int:
    same = next((at for at, (a, b) in enumerate(zip(first.tokens, other.tokens, strict=False)) if a != b), None)
    return min(len(first.tokens), len(other.tokens)) if same is None else max(same, 1)
