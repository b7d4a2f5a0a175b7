"""From a scored answer to its reward."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from fp4rl.rl.judges import JUDGES
from fp4rl.rl.reward_code import Reward, called, failure, function_at, require_callable
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.own_code import in_a_file
from fp4rl.spec.task import Problem, Score
from fp4rl.spec.training import Training

Scorer = Callable[[Problem, str], Score]


@dataclass(frozen=True)
class Scored:
    """The rewards and scores of one batch of answers. All sequences are as long as the batch.

    A reward is what an answer `earned` plus its overlong penalty. It is NaN where the reward function could not judge
    the answer, which then takes no part in its group. `parts` holds what each of several rewards gave, unweighted.
    """

    earned: tuple[float, ...]
    penalties: tuple[float, ...]
    scores: tuple[Score, ...]
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

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
            "reward/mean": _mean(judged),
            **{
                f"reward_part/{name.replace(':', '.')}": _mean([*filter(math.isfinite, given)])
                for name, given in self.parts.items()
            },
            "reward/unjudged": 1 - len(judged) / n,
            "overlong/share": sum(penalty < 0 for penalty in self.penalties) / n,
            "overlong/mean_penalty": sum(self.penalties) / n,
            "accuracy/rollout": sum(score.strict for score in self.scores) / n,
            "accuracy/rollout_flexible": sum(score.flexible for score in self.scores) / n,
            "accuracy/rollout_format": sum(score.formatted for score in self.scores) / n,
        }


@dataclass(frozen=True)
class Part:
    """One reward of a recipe, by its `name`. Without a `function` it is the task's own strict score, 1 or 0."""

    name: str = "accuracy"
    function: Reward | None = None
    weight: float = 1.0

    def given(self, problems: Sequence[Problem], completions: Sequence[str], scores: Sequence[Score]) -> list[float]:
        """Return the reward of each answer, before its weight; NaN for one that cannot be judged.

        Raises CheckFailed, naming the problem, where the function raises or returns something else than a number.
        """
        if self.function is None:
            return [float(score.strict) for score in scores]
        try:
            values = called(self.function, problems, completions)
        except (Exception, SystemExit) as error:
            raise CheckFailed(
                f"the reward {self.name} failed on a batch of {len(problems)} answers (first problem: "
                f"{problems[0].id}): {failure(error, self.function)}"
            ) from error
        return [self._number(*each) for each in zip(problems, completions, values, strict=True)]

    def _number(self, problem: Problem, text: str, value: object) -> float:
        try:
            if isinstance(value, BaseException):
                raise value
            number = math.nan if value is None else float(value)  # type: ignore[arg-type]
        except (Exception, SystemExit) as error:
            assert self.function is not None
            raise CheckFailed(
                f"the reward {self.name} failed on problem {problem.id} (answer {text[:60]!r}): "
                f"{failure(error, self.function)}"
            ) from error
        return number if math.isfinite(number) else math.nan


@dataclass
class Rewarder:
    """Rewards answers: the weighted sum of its parts, by default one point for a correct one, plus overlong penalties.

    An answer that one part cannot judge has no reward: sums of different parts would not be comparable. `say` is called
    once, for the first of them.
    """

    scorer: Scorer
    parts: Sequence[Part] = (Part(),)
    say: Callable[[str], None] = field(default=lambda line: None, repr=False)  # noqa: ARG005
    _reported: bool = False

    @property
    def name(self) -> str:
        """The reward in words."""
        if len(self.parts) == 1:
            return self.parts[0].name
        return " + ".join(f"{part.weight:g} {part.name}" for part in self.parts)

    def score(self, problems: Sequence[Problem], completions: Sequence[str], penalties: Sequence[float]) -> Scored:
        """Score and reward a batch. Raises CheckFailed, naming the problem, where a part does, and where no answer of
        the batch can be judged."""
        scores = tuple(self.scorer(problem, text) for problem, text in zip(problems, completions, strict=True))
        given = {part.name: tuple(part.given(problems, completions, scores)) for part in self.parts}
        self._report(problems, given)
        weighted = ([part.weight * value for value in given[part.name]] for part in self.parts)
        earned = tuple(map(sum, zip(*weighted, strict=True)))
        if earned and all(math.isnan(reward) for reward in earned):
            raise CheckFailed(
                f"the reward {self.name} judged none of {len(earned)} answers (first problem: {problems[0].id}); "
                "it must return a number for at least some"
            )
        return Scored(earned, tuple(penalties), scores, given if len(self.parts) > 1 else {})

    def _report(self, problems: Sequence[Problem], given: Mapping[str, Sequence[float]]) -> None:
        for name, values in given.items():
            for problem, value in zip(problems, values, strict=True):
                if math.isnan(value) and not self._reported:
                    self._reported = True
                    self.say(
                        f"the reward {name} returned no number for problem {problem.id}; such answers teach nothing"
                    )


def rewards_of(recipe: Training) -> tuple[Part, ...]:
    """Return the rewards of a recipe, loaded. Raises what `reward_named` raises."""
    return tuple(Part(each.name, reward_named(each.name, each.pattern), each.weight) for each in recipe.all_rewards)


def reward_named(name: str, pattern: str | None = None) -> Reward | None:
    """Return the reward of that name, or the function at `file.py:function` or `package.module.function`; None for the
    task's own score. `pattern` is that of `regex`.

    Raises NotFoundError for what cannot be imported, InvalidValueError for what is not a function, or none that can be
    called as a reward is.
    """
    if name in JUDGES:
        return JUDGES[name](pattern)
    if name in REWARDS:
        return REWARDS[name]()
    if in_a_file(name) is None and "." not in name:
        raise InvalidValueError(
            f"training.reward {name!r}: write {', '.join(REWARDS)}, or the path file.py:function or "
            "package.module.function"
        )
    function = function_at(name)
    require_callable(function, name)
    return function


# One entry a reward; the key `training.reward` chooses it. None: the task's own strict score.
REWARDS: Mapping[str, Callable[[], Reward | None]] = MappingProxyType(
    {"accuracy": lambda: None, **{name: partial(make, None) for name, make in JUDGES.items()}}
)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
