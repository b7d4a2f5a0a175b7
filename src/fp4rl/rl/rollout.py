"""One generation: prompts in, sampled answers out, with the log-probability that the sampler gave each token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fp4rl.rl.dropout import dropout_off
from fp4rl.rl.prompts import encoded
from fp4rl.rl.repetition import answer_metrics
from fp4rl.rl.rewards import Scored
from fp4rl.tasks.task import Problem


@dataclass(frozen=True)
class Rollout:
    """Answers to one batch of problems, `n` in a row for each.

    `prompt_ids`: token ids of each prompt, once per answer. `completion_ids`: generated ids up to and including the
    end token. `logps`: the sampler's log-probability of each of them. `ended`: whether the end token was reached.
    """

    problems: tuple[Problem, ...]
    prompt_ids: tuple[list[int], ...]
    completion_ids: tuple[list[int], ...]
    logps: tuple[Tensor, ...]
    ended: tuple[bool, ...]
    completions: tuple[str, ...]

    def shape(self) -> dict[str, float]:
        """Lengths in tokens, the shares of answers cut off and empty, and how much they repeat themselves."""
        lengths = [len(ids) for ids in self.completion_ids]
        n = len(lengths)
        return {
            "rollout/answers": float(n),
            "response_length/mean": sum(lengths) / n,
            "response_length/max": float(max(lengths)),
            "response_length/clip_ratio": 1 - sum(self.ended) / n,
            **answer_metrics(self.completion_ids, self.ended),
        }


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout beside what its answers earned."""

    rollout: Rollout
    scored: Scored


class SampledLogprobs(LogitsProcessor):  # type: ignore[misc]
    """Keeps log pi(token) of every token as it is sampled, holding one step's logits at a time.

    A processor sees the logits of step t before the sampler draws from them, and the drawn token at step t + 1; so one
    table of [answers, vocabulary] is kept instead of one per step. Values are those of softmax(logits / temperature)
    over the whole vocabulary, as the loss computes them.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._logits: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._drawn(input_ids)
        self._logits = scores
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probabilities [answers, new tokens] of the finished `sequences`; padding holds whatever was drawn."""
        self._drawn(sequences)
        return torch.stack(self._columns, dim=1)

    def _drawn(self, sequences: Tensor) -> None:
        if self._logits is None:
            return
        logits = self._logits.float() / self._temperature
        chosen = logits.gather(-1, sequences[:, -1:]).squeeze(-1)
        self._columns.append(chosen - logits.logsumexp(-1))
        self._logits = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, and the tokens that end them."""

    config: GenerationConfig
    end_ids: Sequence[int]


def roll_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], sampling: Sampling
) -> Rollout:
    """One sampled answer to each of `problems` (which may repeat)."""
    prompts, mask = encoded(model, tokenizer, problems)
    with dropout_off(model):
        ids, logps = generate(model, prompts, mask, sampling.config)
    lengths, ended = until_end(ids, sampling.end_ids)
    completion_ids = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    return Rollout(
        tuple(problems),
        tuple(row[kept.bool()].tolist() for row, kept in zip(prompts, mask, strict=True)),
        tuple(completion_ids),
        tuple(row[:length] for row, length in zip(logps, lengths, strict=True)),
        tuple(ended),
        tuple(texts),
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, config: GenerationConfig
) -> tuple[Tensor, Tensor]:
    """Sample answers; returns (new token ids, their log-probabilities), both [prompts, tokens], padded on the right."""
    keeper = SampledLogprobs(config.temperature or 1.0)
    sequences = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([keeper]),
    )
    return sequences[:, input_ids.shape[1] :], keeper.finish(sequences)


def seed_rollout(seed: int, step: int, process: int = 0) -> None:
    """Make the rollout of a step a pure function of weights, seed and step, whatever was drawn before it.

    transformers' `generate` takes no generator, it draws from torch's global one; so does TRL when it shuffles the
    batch, and dropout after it. Seeding that one here is what makes a resumed run the same as an uninterrupted one.
    """
    key = hashlib.blake2b(f"rollout/{seed}/{step}/{process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)


def until_end(tokens: Tensor, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Length of each answer up to and including its first end token, and whether it has one. tokens [answers, T]."""
    is_end = torch.isin(tokens, torch.tensor(list(end_ids), device=tokens.device))
    ended = is_end.any(dim=1)
    lengths = torch.where(ended, is_end.int().argmax(dim=1) + 1, tokens.shape[1])
    return lengths.tolist(), ended.tolist()
