"""Fill one training batch: take problems, generate, score, drop groups without spread; repeat up to a limit.

Groups without spread are replaced by new ones, as in DAPO's dynamic sampling (arXiv 2503.14476, section 3.2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from random import Random

import torch
from torch import Tensor

from fp4rl.rl.overlong import soft_overlong_penalty
from fp4rl.rl.rewards import Rewarder
from fp4rl.rl.rollout import Answer, Rollout, ScoredRollout
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import Problem
from fp4rl.spec.training import Training


@dataclass
class PromptStream:
    """An endless stream of shuffled problems. `seed` and `position`, the number taken so far, are its whole state.

    Dynamic sampling takes a varying number of problems a step, so the trainer's own data loader cannot serve it. Each
    of several processes has a stream of its own: process `rank` of `world` gets every `world`-th problem of the order.
    Raises InvalidValueError for an empty training split.
    """

    problems: Sequence[Problem]
    seed: int
    position: int = 0
    rank: int = 0
    world: int = 1
    _order: list[int] = field(default_factory=list, repr=False)
    _epoch: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        if not self.problems:
            raise InvalidValueError("the training split is empty: there is nothing to train on")

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Problem:
        epoch, index = divmod(self.position * self.world + self.rank, len(self.problems))
        if epoch != self._epoch:
            self._order = list(range(len(self.problems)))
            Random(f"prompts/{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        self.position += 1
        return self.problems[self._order[index]]


# Two answers differ when their metric does by more than this; rewards that are sums of floats differ by rounding.
TOLERANCE = 1e-6


def groups_with_spread(metric: Tensor, rollout_n: int, tolerance: float = TOLERANCE) -> Tensor:
    """Return for each group whether its answers differ: metric [groups * rollout_n] -> bool [groups]; NaN is left out.

    DAPO filters by accuracy: with a length penalty in it, the *reward* of an all-wrong group has spread, and dividing
    by that small standard deviation turns the penalty into a full-sized advantage.
    """
    if rollout_n < 2 or metric.dim() != 1 or metric.numel() % rollout_n:
        raise InvalidValueError(f"{tuple(metric.shape)} answers do not make groups of {rollout_n} (at least 2)")
    grouped = metric.float().view(-1, rollout_n)
    highest = grouped.nan_to_num(nan=float("-inf")).amax(-1)
    lowest = grouped.nan_to_num(nan=float("inf")).amin(-1)
    return highest - lowest > tolerance


def reward_accuracy(rewards: Tensor, accuracy: Tensor, rollout_n: int) -> dict[str, float]:
    """Correlate what answers earn with being right, each less its group's mean, as it is learned from: -1..1.

    Both [groups * rollout_n]; empty where either is the same within every group. NaN rewards do not count.
    """
    both = torch.stack([rewards, accuracy.where(rewards.isfinite(), torch.nan)]).double().view(2, -1, rollout_n)
    earned, right = (both - both.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
    scale = (earned.square().sum() * right.square().sum()).sqrt()
    return {"reward/accuracy_correlation": ((earned * right).sum() / scale).item()} if scale > TOLERANCE else {}


@dataclass(frozen=True)
class Refill:
    """The state of filling one training batch. Immutable: `after` returns the next state.

    `wanted`: groups a training batch needs. `max_num_gen_batches`: generations allowed. `kept`, `generated`: groups so
    far. `batches`: generations so far.
    """

    wanted: int
    max_num_gen_batches: int
    kept: int = 0
    generated: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        if self.wanted < 1 or self.max_num_gen_batches < 1:
            counts = f"a batch of {self.wanted} groups with max_num_gen_batches {self.max_num_gen_batches}"
            raise InvalidValueError(f"{counts}: want at least 1 of each")

    def after(self, kept: int, generated: int) -> "Refill":
        """Return the state after one more generation of `generated` groups, of which `kept` have spread."""
        if not 0 <= kept <= generated:
            raise InvalidValueError(f"{kept} of {generated} groups kept")
        return replace(self, kept=self.kept + kept, generated=self.generated + generated, batches=self.batches + 1)

    @property
    def full(self) -> bool:
        """Whether there are enough groups for the training batch."""
        return self.kept >= self.wanted

    @property
    def gave_up(self) -> bool:
        """Whether it is not full and no generation is left."""
        return not self.full and self.max_num_gen_batches <= self.batches

    @property
    def done(self) -> bool:
        """Whether to stop generating: the batch is full, or the limit is reached."""
        return self.full or self.gave_up

    def ask(self, batch: int) -> int:
        """Return how many groups to generate next: those missing / the share kept so far, at most `batch`; 0 when done.

        The first generation takes `batch`. A run that keeps 9 of 10 groups refills with 2 prompts, not with a whole
        batch. Where none was kept yet, the share is unknown, and a whole batch is taken again.
        """
        if self.done:
            return 0
        if self.kept == 0:
            return batch
        return min(batch, ceil((self.wanted - self.kept) * self.generated / self.kept))

    @property
    def trained(self) -> int:
        """The number of groups that reach the loss: surplus ones are left out, so that every update weighs the same."""
        return min(self.kept, self.wanted)

    def report(self, metric: str) -> str | None:
        """Return one line when the batch is not full, else None; `metric` names what groups must have spread in."""
        if not self.gave_up:
            return None
        action = f"training on {self.kept}" if self.kept else "no update in this step"
        return (
            f"dynamic sampling: {self.kept} of {self.wanted} groups have spread in {metric} after {self.batches} "
            f"generations ({self.generated} groups, max_num_gen_batches {self.max_num_gen_batches}); {action}"
        )

    def metrics(self) -> dict[str, float]:
        """Return metrics; `sampling/dropped_share` is the share of generated groups that had no spread."""
        return {
            "sampling/dropped_share": 1 - self.kept / self.generated if self.generated else 0.0,
            "sampling/gen_batches": float(self.batches),
            "sampling/generated_groups": float(self.generated),
            "sampling/trained_groups": float(self.trained),
        }


def choose(spread: Tensor, missing: int) -> Tensor:
    """Return indices of the first `missing` groups with spread, in order of generation: bool [groups] -> int64."""
    return spread.nonzero().flatten()[:missing]


def answers_of(groups: Tensor, rollout_n: int) -> Tensor:
    """Return the row numbers of all answers of groups given by index: [groups] -> [groups * rollout_n]."""
    first = groups.unsqueeze(-1) * rollout_n
    return (first + first.new_tensor(range(rollout_n))).flatten()


Sampler = Callable[[list[Problem]], Rollout]
"""From problems, each repeated `rollout_n` times in a row, to their answers."""


@dataclass(frozen=True)
class Filled:
    """One training batch before padding. `answers` are those that reach the loss, group after group.

    `metric` names what groups must have spread in; None without dynamic sampling.
    """

    generations: tuple[ScoredRollout, ...]
    refill: Refill
    answers: tuple[Answer, ...]
    metric: str | None

    def report(self) -> str | None:
        """Return one line when dynamic sampling left the batch short, else None."""
        return self.refill.report(self.metric) if self.metric is not None else None

    def without_spread(self, rollout_n: int) -> str | None:
        """Return one line when in no group that is trained on the rewards differ, else None."""
        kept = torch.tensor([answer.reward for answer in self.answers])
        if len(kept) and groups_with_spread(kept, rollout_n).any():
            return None
        rewards = torch.tensor([reward for part in self.generations for reward in part.scored.rewards])
        groups, differ = len(rewards) // rollout_n, int(groups_with_spread(rewards, rollout_n).sum())
        if differ:
            by_score = (self.metric or "").startswith("score")
            other = (
                "reward (it counts the overlong punishment), or take easier problems" if by_score else "score or reward"
            )
            return (
                f"in {differ} of the {groups} groups the rewards differ, but the filter kept none of them, for want of "
                f"spread in {self.metric}: set training.filter_groups.metric to {other}"
            )
        return (
            f"none of the {groups} groups of answers has any spread in its rewards (mean {rewards.nanmean().item():g}),"
            " so nothing can be learned from them: take easier problems or a better start, more answers a group "
            "(training.rollout_n) or a higher training.temperature"
        )

    def metrics(self, rollout_n: int) -> dict[str, float]:
        """Return metrics of the first generation, before any filter or penalty, and of the filter.

        `tokens/rollout` counts the tokens of all generations, also of the groups that the filter dropped.
        """
        first = self.generations[0]
        with_spread = groups_with_spread(torch.tensor(first.scored.earned), rollout_n)
        of_groups = {
            "reward/no_spread": 1 - with_spread.float().mean().item(),
            "rollout/groups": float(len(with_spread)),
            "tokens/rollout": float(sum(len(a.tokens) for part in self.generations for a in part.rollout.answers)),
        }
        strict = torch.tensor([float(score.strict) for score in first.scored.scores])
        agreement = reward_accuracy(torch.tensor(first.scored.rewards), strict, rollout_n)
        return {**first.scored.means(), **of_groups, **agreement, **first.rollout.shape(), **self.refill.metrics()}


@dataclass
class Filler:
    """Takes problems from the stream until enough groups have spread."""

    recipe: Training
    stream: PromptStream
    rewarder: Rewarder
    groups: int

    def fill(self, sample: Sampler) -> Filled:
        """Generate until enough groups have spread, or the limit of generations is reached."""
        # Distillation alone has no advantages: a group without spread teaches as much as any other.
        filtered = self.recipe.filters and not self.distils_alone
        refill = Refill(self.groups, self.recipe.filter_groups.max_num_gen_batches if filtered else 1)
        parts: list[ScoredRollout] = []
        spreads: list[Tensor] = []
        while not refill.done:
            problems = self.stream.take(refill.ask(self.groups))
            parts.append(self._scored(sample([p for p in problems for _ in range(self.recipe.rollout_n)])))
            spreads.append(self._spread(parts[-1]) if filtered else torch.ones(len(problems), dtype=torch.bool))
            refill = refill.after(int(spreads[-1].sum()), len(problems))
        answers = [answer for part in parts for answer in part.answers()]
        rows = answers_of(choose(torch.cat(spreads), refill.wanted), self.recipe.rollout_n)
        kept = tuple(answers[row] for row in rows.tolist())
        return Filled(tuple(parts), refill, kept, self.metric if filtered else None)

    @property
    def distils_alone(self) -> bool:
        """Whether the loss has no reward in it."""
        return self.recipe.distillation is not None and self.recipe.distillation.alone

    def _spread(self, part: ScoredRollout) -> Tensor:
        scored, strict = part.scored, tuple(score.strict for score in part.scored.scores)
        metric = {"score": scored.earned, "reward": scored.rewards, "acc": strict}
        chosen = torch.tensor(metric[self.recipe.filter_groups.metric], dtype=torch.float32)
        return groups_with_spread(chosen, self.recipe.rollout_n)

    @property
    def metric(self) -> str:
        """What groups must have spread in, in words."""
        metric = self.recipe.filter_groups.metric
        return f"{metric} ({'the task' if metric == 'acc' else self.rewarder.name})"

    def _scored(self, rollout: Rollout) -> ScoredRollout:
        recipe, buffer = self.recipe, self.recipe.overlong
        texts, lengths = zip(*((answer.text, len(answer.tokens)) for answer in rollout.answers), strict=True)
        penalties = torch.zeros(len(lengths))
        if buffer is not None:
            factor = recipe.overlong_buffer.penalty_factor
            penalties = soft_overlong_penalty(torch.tensor(lengths), recipe.max_response_length, buffer, factor)
        return ScoredRollout(rollout, self.rewarder.score(rollout.problems, texts, penalties.tolist()))
