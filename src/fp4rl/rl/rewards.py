"""From a scored answer to its reward."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError
from fp4rl.spec.task import Problem, Score

Scorer = Callable[[Problem, str], Score]
Reward = Callable[..., Any]
"""`reward(prompt=..., completion=..., answer=...)` -> a number; None or NaN for an answer that cannot be judged."""


@dataclass(frozen=True)
class Scored:
    """The rewards and scores of one batch of answers. All sequences are as long as the batch.

    A reward is what an answer `earned` plus its overlong penalty. It is NaN where the reward function could not judge
    the answer, which then takes no part in its group.
    """

    earned: tuple[float, ...]
    penalties: tuple[float, ...]
    scores: tuple[Score, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """What training increases: `earned` plus penalties."""
        return tuple(earned + penalty for earned, penalty in zip(self.earned, self.penalties, strict=True))

    def means(self) -> Mapping[str, float]:
        """Return means and shares over the batch under the names of their metrics."""
        rewards = self.rewards
        n = max(len(rewards), 1)
        judged = [reward for reward in rewards if math.isfinite(reward)]
        return {
            "reward/mean": sum(judged) / len(judged) if judged else 0.0,
            "reward/unjudged": 1 - len(judged) / n,
            "overlong/share": sum(penalty < 0 for penalty in self.penalties) / n,
            "overlong/mean_penalty": sum(self.penalties) / n,
            "accuracy/rollout": sum(score.strict for score in self.scores) / n,
            "accuracy/rollout_flexible": sum(score.flexible for score in self.scores) / n,
            "accuracy/rollout_format": sum(score.formatted for score in self.scores) / n,
        }


@dataclass
class Rewarder:
    """Rewards answers: one point for a strictly correct one, or what `function` says, plus the overlong penalty.

    `say` is called once, for the first answer that the function could not judge.
    """

    scorer: Scorer
    function: Reward | None = None
    name: str = "accuracy"
    say: Callable[[str], None] = field(default=lambda line: None, repr=False)  # noqa: ARG005
    _reported: bool = False

    def score(self, problems: Sequence[Problem], completions: Sequence[str], penalties: Sequence[float]) -> Scored:
        """Score and reward a batch. Raises CheckFailed, naming the problem, when the function raises, returns something
        else than a number, or can judge no answer of the batch."""
        scores = tuple(self.scorer(problem, text) for problem, text in zip(problems, completions, strict=True))
        earned = tuple(map(self._reward, problems, completions, scores))
        if earned and all(math.isnan(reward) for reward in earned):
            raise CheckFailed(
                f"the reward {self.name} judged none of {len(earned)} answers (first problem: {problems[0].id}); "
                "it must return a number for at least some"
            )
        return Scored(earned, tuple(penalties), scores)

    def _reward(self, problem: Problem, text: str, score: Score) -> float:
        if self.function is None:
            return float(score.strict)
        try:
            value = self.function(prompt=problem.prompt, completion=text, answer=problem.answer)
            value = math.nan if value is None else float(value)
        except Exception as error:
            raise CheckFailed(
                f"the reward {self.name} failed on problem {problem.id} (answer {text[:60]!r}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value) and not self._reported:
            self._reported = True
            self.say(f"the reward {self.name} returned no number for problem {problem.id}; such answers teach nothing")
        return value if math.isfinite(value) else math.nan


def reward_named(name: str) -> Reward | None:
    """Return the reward of that name, or the function at `package.module.function`; None for the task's own score.

    Raises NotFoundError for what cannot be imported, InvalidValueError for what is not a function.
    """
    if name in REWARDS:
        return REWARDS[name]()
    module, _, attribute = name.rpartition(".")
    if not module:
        raise InvalidValueError(
            f"training.reward {name!r}: write {', '.join(REWARDS)}, or the path package.module.function"
        )
    try:
        function = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise NotFoundError(f"training.reward {name!r}: {error}; is its folder on PYTHONPATH?") from None
    if function is None:
        raise NotFoundError(f"training.reward {name!r}: {module} has no {attribute!r}")
    if not callable(function):
        raise InvalidValueError(f"training.reward {name!r} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _math_verify() -> Reward:
    """Return the reward 1 for a completion that equals the answer mathematically (LaTeX, fractions, sets), else 0."""
    try:
        math_verify = import_module("math_verify")
    except ImportError:
        raise NotFoundError("training.reward math_verify needs the extra `math`: pip install 'fp4rl[math]'") from None

    def equivalent(*, completion: str, answer: str, **_: str) -> bool:
        return bool(math_verify.verify(math_verify.parse(answer), math_verify.parse(completion)))

    return equivalent


# One entry a reward; the key `training.reward` chooses it. None: the task's own strict score.
REWARDS: Mapping[str, Callable[[], Reward | None]] = MappingProxyType(
    {"accuracy": lambda: None, "math_verify": _math_verify}
)


def soft_overlong_penalty(
    lengths: Tensor, max_response_length: int, buffer_len: int, penalty_factor: float = 1.0
) -> Tensor:
    """Compute DAPO's soft punishment (arXiv 2503.14476, eq. 13), in [-penalty_factor, 0], to be *added* to the reward.

        0                                        up to max_response_length - buffer_len tokens
        -penalty_factor * (tokens over) / buffer_len          inside the buffer
        -penalty_factor                          at max_response_length and beyond

    lengths [answers], in tokens. verl's `overlong_buffer_cfg` and TRL's `get_soft_overlong_punishment` give the same
    numbers. Raises InvalidValueError when the buffer does not fit: with buffer_len = max_response_length every answer
    is punished, and a buffer that begins below the usual length teaches the policy to skip steps.
    """
    if not 0 < buffer_len < max_response_length:
        raise InvalidValueError(
            f"overlong buffer of {buffer_len} tokens does not fit below max_response_length {max_response_length}: "
            "take about a quarter of it"
        )
    over = lengths.to(torch.float32) - (max_response_length - buffer_len)
    return -penalty_factor * (over / buffer_len).clamp(0.0, 1.0)
