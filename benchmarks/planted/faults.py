"""Failures planted in real runs of the embedded model: from the first step on, or in the middle of a healthy run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from fp4rl.noise.schedule import ScheduleProgress
from fp4rl.rl.generate import Generation, Sampling, transformers_sampler
from fp4rl.rl.session import ResumeState, Run, TrainingSession
from fp4rl.spec.noise import Noise

BASE: Mapping[str, Any] = MappingProxyType(
    {
        "task": {"name": "arithmetic", "difficulty": 2},
        "evaluation": {"count": 1, "profiles": ["full"]},
        "health": {"policy": "note"},
    }
)
STEPS = 12
"""Steps that a run goes on after the failure was planted."""


@dataclass(frozen=True)
class Fault:
    """`plant` changes a live attempt between two steps. `recipe`, `more`: what the spec says from the beginning."""

    name: str
    plant: Callable[[TrainingSession], None]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    onsets: tuple[int, ...] = (0, 12)

    def described(self, seed: int, onset: int) -> dict[str, Any]:
        """The whole description of the run that the failure is planted in after step `onset`."""
        return {
            **BASE,
            **self.more,
            "training": {"steps": onset + STEPS, "train_batch_size": 8, "mini_batch_size": 4, **self.recipe},
            "seed": seed,
        }


def _learning_rate(lr: float) -> Callable[[TrainingSession], None]:
    def plant(attempt: TrainingSession) -> None:
        for group in attempt.trainer.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
        scheduler = getattr(attempt.trainer.lr_scheduler, "scheduler", attempt.trainer.lr_scheduler)
        scheduler.base_lrs = [lr for _ in scheduler.base_lrs]

    return plant


def _noise_on_linear_weights(attempt: TrainingSession) -> None:
    phases = attempt.phases
    phases.noise = Noise.model_validate(
        {"schedule": {"kind": "constant", "sigma": 0.05}, "targets": {"kinds": ["linear"]}}
    )
    phases.progress = ScheduleProgress.of(phases.noise, phases.total_steps)


def _length_is_rewarded(attempt: TrainingSession) -> None:
    filler = attempt.trainer.filler
    filler.rewarder.function = lambda completion, **_: 0.1 * len(completion.split())
    buffer = filler.recipe.overlong_buffer.model_copy(update={"enable": False})
    filler.recipe = filler.recipe.model_copy(update={"overlong_buffer": buffer})
    _learning_rate(1e-3)(attempt)


def _wrong_sign(attempt: TrainingSession) -> None:
    """The reward is turned round: what the trainer does with it is right."""
    attempt.trainer.filler.rewarder.function = lambda completion, answer, **_: (
        -float(completion.split("####")[-1].replace(" ", "") == answer)
    )


def _wrong_sign_in_the_trainer(attempt: TrainingSession) -> None:
    """The reward is right, and the update goes against it: nothing that is logged says so but what comes of it."""
    trainer = attempt.trainer
    whole = trainer._generate_and_score_completions

    def negated(inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = whole(inputs)
        return batch | {"advantages": -batch["advantages"]}

    trainer._generate_and_score_completions = negated


def _equal_rewards(attempt: TrainingSession) -> None:
    attempt.trainer.filler.rewarder.function = lambda **_: 1.0


def _no_end(attempt: TrainingSession) -> None:
    """The sampler waits for a token that the model never says."""

    def deaf(model: Any, tokenizer: Any, prompts: Any, sampling: Sampling) -> list[Generation]:
        ends = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = tokenizer.bos_token_id
        try:
            return transformers_sampler(model, tokenizer, prompts, sampling)
        finally:
            model.generation_config.eos_token_id = ends

    attempt.trainer.parts = replace(attempt.trainer.parts, sampler=deaf)


def _not_a_number(attempt: TrainingSession) -> None:
    weight = next(p for p in attempt.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))


def _nothing(attempt: TrainingSession) -> None:
    """The description alone is the failure."""


def _one_side(phase: str) -> dict[str, Any]:
    return {
        "injection": {
            "mode": "w4a16",
            "deployment": "compressed_tensors",
            "apply_during": {"weight": [phase, "evaluation"]},
        }
    }


FAULTS = (
    Fault("learning rate 5e-3", _learning_rate(5e-3)),
    Fault("noise 0.05 on linear weights in the rollout", _noise_on_linear_weights),
    Fault(
        "reward of 0.1 a token, no penalty, learning rate 1e-3",
        _length_is_rewarded,
        {"filter_groups": {"enable": False}},
    ),
    Fault("reward of the wrong sign", _wrong_sign),
    Fault("advantage of the wrong sign", _wrong_sign_in_the_trainer),
    Fault("one reward for every answer, filtered by reward", _equal_rewards, {"filter_groups": {"metric": "reward"}}),
    Fault("one reward for every answer, filtered by accuracy", _equal_rewards, {"filter_groups": {"metric": "acc"}}),
    Fault(
        "one reward for every answer, unfiltered", _equal_rewards, {"filter_groups": {"enable": False}}, onsets=(12,)
    ),
    Fault("the end token is not recognised", _no_end),
    Fault("a gradient that is NaN", _not_a_number, onsets=(12,)),
    Fault("W4A16 in training, not in the rollout", _nothing, more=_one_side("training"), onsets=(0,)),
    Fault("W4A16 in the rollout, not in training", _nothing, more=_one_side("rollout"), onsets=(0,)),
)


class Planted(TrainingSession):
    """An attempt that meets `fault` after `onset` steps."""

    def __init__(self, run: Run, fault: Fault, onset: int) -> None:
        self.fault = fault
        self.onset = onset
        super().__init__(run, ResumeState())

    def on_begin(self, trainer: Any) -> None:
        super().on_begin(trainer)
        if self.onset == 0:
            self.fault.plant(self)

    def on_step(self, step: int, metrics: dict[str, float]) -> bool:
        ended = super().on_step(step, metrics)
        if step == self.onset:
            self.fault.plant(self)
        return ended
