"""Fill one training batch: generate, score, drop groups without spread and generate again, up to a limit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4rl.rl.batch import Answer, kept_answers
from fp4rl.rl.rewards import Rewarder, soft_overlong_penalty
from fp4rl.rl.rollout import Rollout, ScoredRollout
from fp4rl.rl.sampling import Refill, answers_of, choose, groups_with_spread
from fp4rl.rl.stream import PromptStream
from fp4rl.spec.task import Problem
from fp4rl.spec.training import Training

Sampler = Callable[[list[Problem]], Rollout]
"""Problems, each repeated `rollout_n` times in a row -> their answers."""


@dataclass(frozen=True)
class Filled:
    """One training batch before it is padded. `answers` are those that reach the loss, whole groups in a row.

    `metric` names what groups were to spread in, None where none was dropped.
    """

    generations: tuple[ScoredRollout, ...]
    refill: Refill
    answers: tuple[Answer, ...]
    metric: str | None

    @property
    def any_answer(self) -> Answer:
        """Some answer, kept or not."""
        return kept_answers(self.generations[:1], [[0]])[0]

    def report(self) -> str | None:
        """One line when the filter left the batch short, None else. Nothing is trained on in silence."""
        return self.refill.report(self.metric) if self.metric is not None else None

    def without_spread(self, rollout_n: int) -> str | None:
        """One line where no group that is learned from differs in what it earned (P25)."""
        kept = torch.tensor([answer.reward for answer in self.answers])
        if len(kept) and groups_with_spread(kept, rollout_n).any():
            return None
        rewards = torch.cat([torch.tensor(part.scored.rewards) for part in self.generations])
        groups, differ = len(rewards) // rollout_n, int(groups_with_spread(rewards, rollout_n).sum())
        if differ:
            return (
                f"in {differ} of the {groups} groups the rewards differ, but the filter kept none of them, for want of "
                f"spread in {self.metric}: set training.filter_groups.metric to score or reward"
            )
        return (
            f"none of the {groups} groups of answers has any spread in its rewards (mean {rewards.nanmean().item():g}),"
            " so nothing can be learned from them: take easier problems or a better start, more answers a group "
            "(training.rollout_n) or a higher training.temperature"
        )

    def metrics(self, rollout_n: int) -> dict[str, float]:
        """Of the first generation, which no filter has looked at and no penalty touched; and of the filter."""
        first = self.generations[0]
        with_spread = groups_with_spread(torch.tensor(first.scored.earned), rollout_n)
        of_groups = {
            "reward/no_spread": 1 - with_spread.float().mean().item(),
            "rollout/groups": float(len(with_spread)),
        }
        return {**first.scored.means(), **of_groups, **first.rollout.shape(), **self.refill.metrics()}


class Filler:
    """Takes problems from the stream until enough groups teach something."""

    def __init__(self, recipe: Training, stream: PromptStream, rewarder: Rewarder, groups: int) -> None:
        self.recipe = recipe
        self.stream = stream
        self.rewarder = rewarder
        self.groups = groups

    def fill(self, sample: Sampler) -> Filled:
        """Generate until enough groups have spread, or the limit of generations is reached."""
        filtered = self._filtered
        refill = Refill(self.groups, self.recipe.filter_groups.max_num_gen_batches if filtered else 1)
        parts: list[ScoredRollout] = []
        spreads: list[Tensor] = []
        while not refill.done:
            problems = self.stream.take(refill.ask(self.groups))
            parts.append(self._scored(sample([p for p in problems for _ in range(self.recipe.rollout_n)])))
            spreads.append(self._spread(parts[-1]) if filtered else torch.ones(len(problems), dtype=torch.bool))
            refill = refill.after(int(spreads[-1].sum()), len(problems))
        kept = kept_answers(parts, _rows(spreads, refill.wanted, self.recipe))
        return Filled(tuple(parts), refill, tuple(kept), self.metric if filtered else None)

    @property
    def _filtered(self) -> bool:
        # A group without spread teaches as much as any other where there are no advantages.
        return self.recipe.filters and not self.distils_alone

    @property
    def distils_alone(self) -> bool:
        """Whether rewards have no part in what is learned."""
        return self.recipe.distillation is not None and self.recipe.distillation.alone

    def _spread(self, part: ScoredRollout) -> Tensor:
        scored = part.scored
        metric = {"score": scored.earned, "reward": scored.rewards, "acc": scored.strict}
        chosen = torch.tensor(metric[self.recipe.filter_groups.metric], dtype=torch.float32)
        return groups_with_spread(chosen, self.recipe.rollout_n)

    @property
    def metric(self) -> str:
        """What groups are to spread in, for a reader."""
        metric = self.recipe.filter_groups.metric
        return f"{metric} ({'the task' if metric == 'acc' else self.rewarder.name})"

    def _scored(self, rollout: Rollout) -> ScoredRollout:
        lengths = [len(ids) for ids in rollout.completion_ids]
        return ScoredRollout(
            rollout, self.rewarder.score(rollout.problems, rollout.completions, self._penalties(lengths))
        )

    def _penalties(self, lengths: list[int]) -> list[float]:
        recipe, buffer = self.recipe, self.recipe.overlong
        if buffer is None:
            return [0.0] * len(lengths)
        penalties: list[float] = soft_overlong_penalty(
            torch.tensor(lengths), recipe.max_response_length, buffer, recipe.overlong_buffer.penalty_factor
        ).tolist()
        return penalties


def _rows(spreads: list[Tensor], wanted: int, recipe: Training) -> list[list[int]]:
    """Row numbers of the answers that reach the loss, one list per generation."""
    rows: list[list[int]] = []
    missing = wanted
    for spread in spreads:
        groups = choose(spread, missing)
        missing -= len(groups)
        rows.append(answers_of(groups, recipe.rollout_n).tolist())
    return rows
