"""The reward of a run of verl: the experiment's own, of the answer that verl sampled (`reward.custom_reward_function`).

verl adds the overlong punishment to `score`; `acc` is the task's own strict score, whatever the reward is.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fp4rl.engines.verl import settings
from fp4rl.rl.rewards import Rewarder, rewards_of
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.task import Problem


def compute_score(
    *, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], **_: object
) -> dict[str, float]:
    """Return `score`, `acc`, `flexible` and `formatted` of one answer.

    Raises CheckFailed where the reward function fails or returns no number: verl has no answers without a reward.
    """
    rewarder, stop = _reward()
    split = extra_info["split"]
    problem = Problem(extra_info["id"], extra_info["prompt"], ground_truth, solution="", split=split)
    text = solution_str if split == "train" else _before(solution_str, stop)
    scored = rewarder.score([problem], [text], [0.0])
    score = scored.scores[0]
    return {
        "score": scored.earned[0],
        "acc": float(score.strict),
        "flexible": float(score.flexible),
        "formatted": float(score.formatted),
    }


@lru_cache(maxsize=1)
def _reward() -> tuple[Rewarder, tuple[str, ...]]:
    experiment = settings.experiment()
    if experiment is None:
        raise NotFoundError("no experiment is set for this run of verl; start it by the script of `fp4rl verl-config`")
    stop = experiment.evaluation.for_task(experiment.task).stop or ()
    return Rewarder(experiment.task.score, rewards_of(experiment.training)), stop


def _before(text: str, stop: tuple[str, ...]) -> str:
    """Return the text before the first of `stop`, where an evaluation of fp4rl ends an answer."""
    return text[: min((text.find(words) for words in stop if words in text), default=len(text))]
