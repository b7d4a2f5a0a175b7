"""One rollout: prompts in, sampled answers out, with the log-probability that the sampler gave each token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.rl.generate import Generation, Sampler, Sampling
from fp4rl.rl.prompts import encoded
from fp4rl.rl.rewards import Scored
from fp4rl.spec.task import Problem

NGRAM = 4


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


def roll_out(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
) -> Rollout:
    """Sample one answer to each of `problems` (which may repeat)."""
    prompts = encoded(model, tokenizer, problems)
    answers = sampler(model, tokenizer, prompts, sampling)
    return Rollout(
        tuple(problems),
        tuple(prompts),
        tuple(answer.tokens for answer in answers),
        tuple(_scored(answer) for answer in answers),
        tuple(answer.ended for answer in answers),
        tuple(answer.text for answer in answers),
    )


def _scored(answer: Generation) -> Tensor:
    """The log-probabilities of an answer; NaN, which every reader takes for `unknown`, where the sampler gave none."""
    return torch.full((len(answer.tokens),), torch.nan) if answer.logps is None else answer.logps


def seed_rollout(seed: int, step: int, process: int = 0) -> None:
    """Make the rollout of a step a pure function of weights, seed and step, whatever was drawn before it.

    transformers' `generate` takes no generator, it draws from torch's global one; so does TRL when it shuffles the
    batch, and dropout after it. Seeding that one here is what makes a resumed run the same as an uninterrupted one.
    """
    key = hashlib.blake2b(f"rollout/{seed}/{step}/{process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)


def repeated_share(token_ids: Sequence[int], ngram: int = NGRAM) -> float:
    """Share of an answer's n-grams that occurred before in it: 0 when all differ, near 1 for a loop.

    0 for an answer shorter than `ngram` tokens. Source: arXiv 2502.03373, appendix C.2 (there a penalty).
    """
    count = len(token_ids) - ngram + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(token_ids[i : i + ngram]) for i in range(count)}) / count


def answer_metrics(completion_ids: Sequence[Sequence[int]], ended: Sequence[bool]) -> dict[str, float]:
    """Signs that a rollout is dead although its length looks well; empty without answers.

    `response_length/empty_ratio`: share of answers that are nothing but their end token. `response/repetition`: mean
    share of repeated 4-grams.
    """
    if not completion_ids:
        return {}
    empty = sum(len(ids) - end <= 0 for ids, end in zip(completion_ids, ended, strict=True))
    return {
        "response_length/empty_ratio": empty / len(completion_ids),
        "response/repetition": sum(repeated_share(ids) for ids in completion_ids) / len(completion_ids),
    }
