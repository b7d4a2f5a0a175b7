"""The problems that a run uses: all of a split, or those whose prompts fit, where the others are to be dropped."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fp4rl.models.load import tokenizer_of
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.prompts import too_long
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import Problem, Split, first


def tokenizer_for(experiment: Experiment) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an experiment's start model."""
    path = experiment.model.path
    return build_tokenizer() if path is None else tokenizer_of(Path(path))


def problems_of(experiment: Experiment, split: Split, count: int | None = None) -> tuple[Problem, ...]:
    """Return the first `count` problems of a split that a run uses; all without a count.

    With `training.filter_overlong_prompts` those of more than `max_prompt_length` tokens are left out first.
    """
    if not experiment.training.filter_overlong_prompts:
        return experiment.task.problems(split, count)
    every = experiment.task.problems(split)
    longer = _longer(experiment, every)
    kept = [problem for problem in every if problem.id not in longer]
    return first(kept, count, f"the {split} split without prompts over the limit")


def dropped(experiment: Experiment) -> str | None:
    """Return how many prompts are left out of training for their length, in words; None where none is."""
    if not experiment.training.filter_overlong_prompts:
        return None
    every, limit = experiment.task.problems("train"), experiment.training.max_prompt_length
    longer = _longer(experiment, every)
    if not longer:
        return None
    return f"{len(longer)} of {len(every)} training prompts have more than {limit} tokens and are left out"


def _longer(experiment: Experiment, problems: tuple[Problem, ...]) -> set[str]:
    limit = experiment.training.max_prompt_length
    return {problem.id for _, problem in too_long(problems, limit, lambda: tokenizer_for(experiment))}
