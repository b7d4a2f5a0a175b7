"""From problems to sampled answers, their advantages, and the padded micro-batches of a step."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fp4rl.rl.events import SampledAnswer
from fp4rl.rl.generate import Generation, Sampler, Sampling
from fp4rl.rl.prompts import encoded, padded
from fp4rl.rl.rewards import Scored
from fp4rl.rl.routing import padded_routes
from fp4rl.spec.algorithms import ADV_ESTIMATORS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, require_names
from fp4rl.spec.task import Problem
from fp4rl.spec.training import Training

NGRAM = 4
_MOST = 2000  # characters of each text of a sampled answer


@dataclass(frozen=True)
class Rollout:
    """Answers to one batch of problems, `n` in a row for each; `prompt_ids`: tokens of each prompt, once per answer."""

    problems: tuple[Problem, ...]
    prompt_ids: tuple[list[int], ...]
    answers: tuple[Generation, ...]

    def shape(self) -> dict[str, float]:
        """Return metrics: lengths in tokens, the shares of answers cut off and empty, and their repetition.

        `response_length/empty_ratio`: share of answers that are only their end token. `response/repetition`: mean share
        of repeated 4-grams. Both are signs of a dead rollout although its length looks normal.
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
    """One answer with its reward and the token ids of its prompt."""

    prompt_ids: list[int]
    generation: Generation
    reward: float


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the scores of its answers."""

    rollout: Rollout
    scored: Scored

    def answers(self) -> list[Answer]:
        """Return its answers with their rewards, in order."""
        rollout = self.rollout
        return [Answer(*each) for each in zip(rollout.prompt_ids, rollout.answers, self.scored.rewards, strict=True)]

    def sample(self, rollout_n: int) -> tuple[SampledAnswer, ...]:
        """Return the first two answers to the first two of its problems."""
        rollout, scored = self.rollout, self.scored
        rows = [row for row in (0, 1, rollout_n, rollout_n + 1) if row < len(rollout.answers)]
        return tuple(
            SampledAnswer(
                problem_id=rollout.problems[row].id,
                question=_shown(rollout.problems[row].question or rollout.problems[row].prompt),
                gold=_shown(rollout.problems[row].answer),
                completion=_shown(rollout.answers[row].text),
                tokens=len(rollout.answers[row].tokens),
                truncated=not rollout.answers[row].ended,
                reward=scored.rewards[row],
                strict=scored.scores[row].strict,
            )
            for row in rows
        )


def _shown(text: str) -> str:
    """Return at most _MOST characters, with a word on how many more there were."""
    return text if len(text) <= _MOST else f"{text[:_MOST]} [{len(text) - _MOST} more characters]"


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
    """Seed torch's generator, so that the rollout of a step is a pure function of weights, seed and step.

    transformers' `generate` takes no generator but draws from torch's global one; so do TRL's shuffling of the batch
    and dropout after it. Seeding it here makes a resumed run the same as an uninterrupted one.
    """
    key = hashlib.blake2b(f"rollout/{seed}/{step}/{process}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)


def repeated_share(token_ids: Sequence[int], ngram: int = NGRAM) -> float:
    """Return the share of an answer's n-grams that occurred in it before: 0 when all differ, near 1 for a loop.

    0 for an answer shorter than `ngram` tokens. Source: arXiv 2502.03373, appendix C.2 (there a penalty).
    """
    count = len(token_ids) - ngram + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(token_ids[i : i + ngram]) for i in range(count)}) / count


# Added to a standard deviation before dividing. TRL adds 1e-4, verl 1e-6; with 0/1 rewards it makes no difference.
EPSILON = 1e-4


def group_advantages(
    rewards: Tensor, rollout_n: int, adv_estimator: str = "grpo", norm_adv_by_std: bool = True
) -> Tensor:
    """Compute advantages of answers in consecutive groups of `rollout_n`; rewards, of any dtype, and advantages are
    [groups * rollout_n].

    A NaN reward (an answer that could not be scored) takes no part in its group and gets advantage 0.
    Raises InvalidValueError when the answers do not divide into groups of at least two, NotFoundError for an unknown
    estimator.
    """
    if rollout_n < 2 or rewards.dim() != 1 or rewards.numel() % rollout_n:
        raise InvalidValueError(
            f"{tuple(rewards.shape)} rewards do not make groups of {rollout_n}: give rollout_n >= 2 answers a prompt"
        )
    if adv_estimator not in ESTIMATORS:
        raise NotFoundError(f"no adv_estimator {adv_estimator!r}{nearest(adv_estimator, ESTIMATORS)}")
    grouped = rewards.float().view(-1, rollout_n)  # [groups, n]
    return ESTIMATORS[adv_estimator](grouped, norm_adv_by_std).nan_to_num(nan=0.0).flatten()


def _grpo(grouped: Tensor, by_std: bool) -> Tensor:
    """Compute (reward - group mean) / group standard deviation (arXiv 2402.03300); without `by_std` only the
    difference, which is Dr. GRPO (arXiv 2503.20783)."""
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    return centred / (_nan_std(grouped, -1) + EPSILON) if by_std else centred


def _rloo(grouped: Tensor, _by_std: bool) -> Tensor:
    """Compute reward - mean of the *other* answers (arXiv 2402.14740)."""
    count = grouped.isfinite().sum(-1, keepdim=True)  # r - mean of the others = (r - mean of all) n / (n - 1)
    return (grouped - grouped.nanmean(-1, keepdim=True)) * count / (count - 1).clamp(min=1)


def _reinforce_plus_plus_baseline(grouped: Tensor, _by_std: bool) -> Tensor:
    """Compute (reward - group mean) / standard deviation of the whole batch (arXiv 2501.03262)."""
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    return centred / (_nan_std(centred.flatten(), 0) + EPSILON)


# Rewards [groups, n] (NaN: not scored), and whether to divide by the standard deviation -> advantages [groups, n].
ESTIMATORS: Mapping[str, Callable[[Tensor, bool], Tensor]] = MappingProxyType(
    {"grpo": _grpo, "rloo": _rloo, "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline}
)
require_names("adv_estimator", ESTIMATORS, ADV_ESTIMATORS)


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Return the unbiased standard deviation without NaN along `dim` (kept); 0 of fewer than two values."""
    count = values.isfinite().sum(dim, keepdim=True)
    centred = (values - values.nanmean(dim, keepdim=True)).nan_to_num(nan=0.0)
    return torch.sqrt(centred.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1))


Batch = dict[str, Tensor]


def training_batch(
    answers: Sequence[Answer], stand_in: Answer, recipe: Training, rows: int, pad_id: int, device: torch.device
) -> Batch:
    """Return the padded tensors of one step, in `rows` rows: prompts on the left, answers on the right.

    Where there are fewer answers than `rows`, the rest are copies of the first one (of `stand_in` without any) under an
    empty mask: they give the batch its shape and are in no sum. Keys as in TRL: prompt_ids,
    prompt_mask [rows, P]; completion_ids, completion_mask, sampling_per_token_logps [rows, T]; `advantages` [rows] and,
    where truncated answers are masked, `loss_mask` [rows, T]. A log-probability that the sampler did not give is NaN,
    which means unknown everywhere. For a mixture of experts: `prompt_routes` [rows, P, layers, k] and
    `completion_routes` [rows, T, layers, k].
    """
    missing = rows - len(answers)
    filled = [*answers, *[next(iter(answers), stand_in)] * missing]
    counts = torch.tensor([1] * len(answers) + [0] * missing)
    prompts, prompt_mask = padded([a.prompt_ids for a in filled], pad_id)
    completions, completion_mask = padded([a.generation.tokens for a in filled], pad_id, left=False)
    logps = torch.zeros(completions.shape, dtype=torch.float32)
    for row, (_, generation, _) in zip(logps, filled, strict=True):
        row[: len(generation.tokens)] = torch.nan if generation.logps is None else generation.logps
    advantages = torch.zeros(rows)
    if answers:
        by_std = recipe.published.norm_adv_by_std if recipe.norm_adv_by_std is None else recipe.norm_adv_by_std
        rewards = torch.tensor([a.reward for a in answers])
        advantages[: len(answers)] = group_advantages(rewards, recipe.rollout_n, recipe.adv_estimator, by_std)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask * counts.unsqueeze(-1),
        "sampling_per_token_logps": logps,
        "advantages": advantages,
    }
    routes = [a.generation.routes for a in filled if a.generation.routes is not None]
    if len(routes) == len(filled):
        widths, lengths = (prompts.shape[1], completions.shape[1]), [len(a.prompt_ids) for a in filled]
        batch["prompt_routes"], batch["completion_routes"] = padded_routes(routes, lengths, widths)
    if recipe.mask_truncated:  # the attention mask stays as it is: only the loss forgets truncated answers
        ended = torch.tensor([a.generation.ended for a in filled])
        batch["loss_mask"] = batch["completion_mask"] * ended.unsqueeze(-1)
    return {name: value.to(device) for name, value in batch.items()}


def by_length(batches: Sequence[Batch], span: int) -> list[Batch]:
    """Sort answers by length within each update of `span` micro-batches, and cut every micro-batch to its width.

    So no padding is computed that no row of a micro-batch needs. An update keeps its answers, and so its loss.
    Tensors are [rows], [rows, prompt] (`prompt_*`, padded on the left) or [rows, answer] (padded on the right).
    """
    sorted_batches: list[Batch] = []
    for first in range(0, len(batches), span):
        parts = batches[first : first + span]
        sorted_batches += [_cut(part) for part in (_sorted(parts) if len(parts) > 1 else parts)]
    return sorted_batches


def _sorted(parts: Sequence[Batch]) -> list[Batch]:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = (whole["prompt_mask"].sum(-1) + whole["completion_mask"].sum(-1)).argsort(stable=True)
    indices = torch.split(order, [len(part["completion_mask"]) for part in parts])
    return [{name: value[rows] for name, value in whole.items()} for rows in indices]


def _cut(batch: Batch) -> Batch:
    prompt, answer = (max(int(batch[f"{name}_mask"].sum(-1).max()), 1) for name in ("prompt", "completion"))
    columns = {name: slice(-prompt, None) if name.startswith("prompt_") else slice(answer) for name in batch}
    return {name: value[:, columns[name]] if value.dim() > 1 else value for name, value in batch.items()}
