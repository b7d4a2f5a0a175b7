"""One rollout: prompts in, sampled answers out, with the log-probability that the sampler gave each token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.rl.generate import Generation, Sampler, Sampling
from fp4rl.rl.prompts import encoded
from fp4rl.rl.rewards import Scored
from fp4rl.spec.task import Problem

NGRAM = 4


@dataclass(frozen=True)
class Rollout:
    """Answers to one batch of problems, `n` in a row for each; `prompt_ids`: tokens of each prompt, once per answer."""

    problems: tuple[Problem, ...]
    prompt_ids: tuple[list[int], ...]
    answers: tuple[Generation, ...]

    def shape(self) -> dict[str, float]:
        """Lengths in tokens, the shares of answers cut off and empty, and how much they repeat themselves.

        `response_length/empty_ratio`: share of answers that are nothing but their end token. `response/repetition`:
        mean share of repeated 4-grams. Both are signs that a rollout is dead although its length looks well.
        """
        lengths = [len(answer.tokens) for answer in self.answers]
        n = len(lengths)
        return {
            "rollout/answers": float(n),
            "response_length/mean": sum(lengths) / n,
            "response_length/max": float(max(lengths)),
            "response_length/clip_ratio": 1 - sum(answer.ended for answer in self.answers) / n,
            "response_length/empty_ratio": sum(len(answer.tokens) <= answer.ended for answer in self.answers) / n,
            "response/repetition": sum(repeated_share(answer.tokens) for answer in self.answers) / n,
        }


class Answer(NamedTuple):
    """One answer that was scored, beside the token ids of its prompt."""

    prompt_ids: list[int]
    generation: Generation
    reward: float


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout beside what its answers earned."""

    rollout: Rollout
    scored: Scored

    def answers(self) -> list[Answer]:
        """Its answers, in order."""
        rollout = self.rollout
        return [Answer(*each) for each in zip(rollout.prompt_ids, rollout.answers, self.scored.rewards, strict=True)]


def roll_out(
    sampler: Sampler,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
) -> Rollout:
    """Sample one answer to each of `problems` (which may repeat)."""
    prompts = encoded(model, tokenizer, problems)
    return Rollout(tuple(problems), tuple(prompts), tuple(sampler(model, tokenizer, prompts, sampling)))


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
