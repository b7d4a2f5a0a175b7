"""Checks before a run starts: data, model, patterns and profiles, without loading a weight."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import skeleton, tokenizer_of
from fp4rl.models.transforms.start import described_skeleton
from fp4rl.noise.targets import no_noise_on_codes, noisy_weights
from fp4rl.rl.components import require_optimizer
from fp4rl.rl.evaluate import choosing_runner, evaluation_runner
from fp4rl.rl.generate import sampler_named
from fp4rl.rl.inputs import ALONE, Stages, teacher_folder
from fp4rl.rl.lora import with_lora
from fp4rl.rl.problems import problems_of, tokenizer_for
from fp4rl.rl.prompts import require_prompts_fit, require_prompts_open, token_ids
from fp4rl.rl.rewards import rewards_of
from fp4rl.rl.routing import mixtures
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import START, TEACHER, links
from fp4rl.spec.task import Problem
from fp4rl.tasks.overlap import check_disjoint


def check(experiment: Experiment, stages: Stages = ALONE) -> None:
    """Check everything that a run will need; `stages` are the folders that other runs trained and this one takes.

    Raises NotFoundError or InvalidValueError for anything in the experiment that cannot be used, CheckFailed when
    held-out problems are also trained on.
    """
    _epochs_are_steps(experiment)
    _other_runs_are_given(experiment, stages)
    rewards_of(experiment.training)
    require_optimizer(experiment.training.optimizer)
    sampler_named(experiment.rollout)
    _reference_can_be_what_it_says(experiment)
    _one_correction_is_enough(experiment)
    task = experiment.task
    runner = evaluation_runner(experiment)
    learned = problems_of(experiment, "train")
    check_disjoint(task, learned, runner.problems)
    _what_chooses_does_not_judge(experiment, runner.problems)
    for problem in (*learned[:1], *runner.problems[:1]):
        task.score(problem, problem.solution)  # a scorer that fails must fail before anything is sampled
    path = stages.start or experiment.model.path
    tokenizer = cache(partial(tokenizer_for, experiment))
    require_prompts_fit((*learned, *runner.problems), experiment.training.max_prompt_length, tokenizer)
    one_of_each = (*learned[:1], *runner.problems[:1])  # they share their template
    require_prompts_open(one_of_each, token_ids(tokenizer(), one_of_each), tokenizer())
    model = described_skeleton(experiment.model, path)
    _answers_fit_the_positions(experiment, model.config)
    if (teacher := teacher_folder(experiment, stages)) is not None:
        _teacher_reads_the_same(teacher, skeleton(teacher), model, tokenizer())
    if experiment.training.routing_replay and not mixtures(model):
        raise InvalidValueError(
            f"training.routing_replay: {type(model).__name__} has no experts to choose; leave it out"
        )
    if experiment.model.lora is not None:
        model = with_lora(model, experiment.model.lora, path or "")
    for profile in runner.precisions().values():
        if profile.injection is not None:
            resolve(model, profile.injection)
    plans = resolve(model, experiment.injection).plans if experiment.injection is not None else ()
    if experiment.noise is not None:
        packed = {f"{plan.name}{end}" for plan in plans if plan.packed for end in ("", ".weight")}
        for weight in noisy_weights(model, experiment.noise, share=0.0):
            if weight.name in packed:
                raise InvalidValueError(no_noise_on_codes(weight.name))


def _what_chooses_does_not_judge(experiment: Experiment, judged: tuple[Problem, ...]) -> None:
    """Raise CheckFailed where the best step would be chosen on problems that it is judged on at the end."""
    if experiment.training.deployed == "best":
        check_disjoint(experiment.task, choosing_runner(experiment).problems, judged)


def _other_runs_are_given(experiment: Experiment, stages: Stages) -> None:
    """Raise InvalidValueError for weights of another run that nobody has said where to find."""
    needed = links(experiment)
    if START in needed and stages.start is None:
        raise InvalidValueError(
            "start: the folder of that run's weights is not given; `fp4rl run` takes it from --runs"
        )
    if TEACHER in needed and teacher_folder(experiment, stages) is None:
        raise InvalidValueError(f"{TEACHER}: the folder of its weights is not given; `fp4rl run` takes it from --runs")


def _epochs_are_steps(experiment: Experiment) -> None:
    if experiment.training.epochs is not None:
        cure = "`fp4rl.lab.epochs.in_steps` counts them, as `fp4rl run` does; or write training.steps"
        raise InvalidValueError(f"training.epochs: a run counts in steps; {cure}")


def _reference_can_be_what_it_says(experiment: Experiment) -> None:
    """Raise InvalidValueError for a reference in full precision in a phase that the injection acts in."""
    recipe, injection = experiment.training, experiment.injection
    distills = recipe.distillation is not None
    if injection is None or not (recipe.kl or distills):
        return
    full = distills or recipe.reference_precision == "full"
    if full and injection.apply_during.active("reference"):
        raise InvalidValueError(
            "injection.apply_during names the reference phase, but the reference is meant in full precision: "
            "leave it out there, or set training.reference_precision: deployment"
        )


def _teacher_reads_the_same(folder: Path, teacher: Any, student: Any, tokenizer: Any) -> None:
    """Raise InvalidValueError for a teacher whose distribution is over other tokens than the student's."""
    theirs, ours = (int(model.get_output_embeddings().weight.shape[0]) for model in (teacher, student))
    if theirs != ours or tokenizer_of(folder).get_vocab() != tokenizer.get_vocab():
        raise InvalidValueError(
            f"training.distillation.teacher: {folder} has another vocabulary ({theirs} tokens, the student {ours}); "
            "take a teacher with the same tokenizer"
        )


def _answers_fit_the_positions(experiment: Experiment, config: Any) -> None:
    """Raise InvalidValueError for answers beyond the model's positions: there it fails, or its answers mean nothing."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    recipe, longest = experiment.training, "training.max_response_length"
    answer = recipe.max_response_length
    if experiment.evaluation.max_new_tokens > answer:
        longest, answer = "evaluation.max_new_tokens", experiment.evaluation.max_new_tokens
    if positions is not None and recipe.max_prompt_length + answer > positions:
        raise InvalidValueError(
            f"training.max_prompt_length {recipe.max_prompt_length} and {longest} {answer} are more than the "
            f"{positions} positions of the model (max_position_embeddings); set {longest} to "
            f"{max(positions - recipe.max_prompt_length, 1)} or less, or max_prompt_length to that of your prompts"
        )


def _one_correction_is_enough(experiment: Experiment) -> None:
    noise, correction = experiment.noise, experiment.training.rollout_correction
    if noise is not None and noise.logprobs == "noisy" and correction.rollout_is != "none":
        raise InvalidValueError(
            "training.rollout_correction would correct twice: noise.logprobs: noisy takes the ratio against the noisy "
            "sampler already; drop one of them"
        )
