"""From the answers that are kept to the padded micro-batches that the loss reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4rl.rl.advantages import group_advantages
from fp4rl.rl.prompts import padded
from fp4rl.rl.rollout import ScoredRollout
from fp4rl.spec.training import Training

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """One answer of a kept group, ready for a batch."""

    prompt_ids: list[int]
    completion_ids: list[int]
    logps: Tensor
    reward: float
    ended: bool


def kept_answers(parts: Sequence[ScoredRollout], rows: Sequence[Sequence[int]]) -> list[Answer]:
    """The answers in `rows` (row numbers, one list per part), in order."""
    return [
        Answer(
            part.rollout.prompt_ids[i],
            part.rollout.completion_ids[i],
            part.rollout.logps[i],
            part.scored.rewards[i],
            part.rollout.ended[i],
        )
        for part, chosen in zip(parts, rows, strict=True)
        for i in chosen
    ]


def training_batch(
    answers: Sequence[Answer], stand_in: Answer, recipe: Training, rows: int, pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of one step: `tensors`, with `advantages` [rows] and, where truncated answers are masked,
    `loss_mask` [rows, T]. Without any answer `stand_in` gives the batch its shape, under an empty mask."""
    batch = tensors(answers or [stand_in], rows, pad_id, device)
    if not answers:
        batch["completion_mask"].zero_()
    advantages = torch.zeros(rows)
    if answers:
        advantages[: len(answers)] = _advantages(answers, recipe)
    batch["advantages"] = advantages.to(device)
    if recipe.mask_truncated:
        cut = torch.tensor([not a.ended for a in answers] + [False] * (rows - len(answers)), device=device)
        batch["loss_mask"] = mask_truncated(batch["completion_mask"], cut)
    return batch


def _advantages(answers: Sequence[Answer], recipe: Training) -> Tensor:
    by_std = recipe.published.norm_adv_by_std if recipe.norm_adv_by_std is None else recipe.norm_adv_by_std
    rewards = torch.tensor([a.reward for a in answers])
    return group_advantages(rewards, recipe.rollout_n, recipe.adv_estimator, by_std)


def tensors(answers: Sequence[Answer], rows: int, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Padded tensors of `rows` rows: prompts on the left, answers on the right.

    Where fewer answers were kept than `rows`, the rest are copies of the first one under an empty mask: they are in
    the batch for its shape and in no sum. Keys as TRL names them: prompt_ids, prompt_mask [rows, P]; completion_ids,
    completion_mask, sampling_per_token_logps [rows, T].
    """
    filled = [*answers, *([answers[0]] * (rows - len(answers)))]
    counts = torch.tensor([1] * len(answers) + [0] * (rows - len(answers)))
    prompts, prompt_mask = padded([a.prompt_ids for a in filled], pad_id)
    completions, completion_mask = padded([a.completion_ids for a in filled], pad_id, left=False)
    logps = torch.zeros(completions.shape, dtype=torch.float32)
    for row, answer in zip(logps, filled, strict=True):
        row[: len(answer.logps)] = answer.logps
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask * counts.unsqueeze(-1),
        "sampling_per_token_logps": logps,
    }
    return {name: value.to(device) for name, value in batch.items()}


def mask_truncated(mask: Tensor, truncated: Tensor) -> Tensor:
    """The loss mask [answers, tokens] without the truncated answers: they are neither rewarded nor punished.

    The attention mask must stay as it is: only the loss forgets them.
    """
    return mask.masked_fill(truncated.bool().unsqueeze(-1), 0)


def by_length(batches: Sequence[Batch], span: int) -> list[Batch]:
    """Sort the micro-batches of whole updates, `span` each, by tokens within an update, and cut them to their width.

    Padding that no row of a micro-batch needs is not computed. An update keeps its answers, and so its loss.
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
    return {name: _columns(name, value, prompt, answer) for name, value in batch.items()}


def _columns(name: str, value: Tensor, prompt: int, answer: int) -> Tensor:
    if value.dim() < 2:
        return value
    return value[:, -prompt:] if name.startswith("prompt_") else value[:, :answer]
