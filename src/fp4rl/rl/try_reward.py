"""A few answers of the model that a run would start from, to see what a reward makes of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fp4rl.models.load import load
from fp4rl.rl import processes
from fp4rl.rl.generate import Sampling, transformers_sampler
from fp4rl.rl.inputs import start_folder
from fp4rl.rl.prompts import encoded
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import Problem

_AT_ONCE = 16


def sampled(
    experiment: Experiment, problems: Sequence[Problem], cache: Path, on_answers: Callable[[str, int, int], None]
) -> list[str]:
    """Return an answer to each problem, drawn from the start model as a rollout draws it, in full precision.

    `on_answers` is called with (stage, done, all). Warmed-up models are kept in `cache`.
    """
    recipe, steps = experiment.training, experiment.model.embedded.warm_up_steps if experiment.model.embedded else 0
    start = start_folder(
        experiment.model, experiment.task, cache, lambda step, _: on_answers("warm-up", step, max(steps, 1))
    )
    model, tokenizer = load(start, experiment.model.dtype, experiment.model.experts_implementation)
    model.to(processes.device())
    sampling = Sampling(recipe.max_response_length, recipe.temperature, recipe.top_p)
    texts: list[str] = []
    torch.manual_seed(experiment.seed)
    for first in range(0, len(problems), _AT_ONCE):
        prompts = encoded(model, tokenizer, problems[first : first + _AT_ONCE])
        texts += [answer.text for answer in transformers_sampler(model, tokenizer, prompts, sampling)]
        on_answers("answers", len(texts), len(problems))
    return texts
