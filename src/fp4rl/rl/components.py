"""What a trainer is made of besides the model, so that the file that touches TRL holds nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4rl.rl.generate import Sampler, transformers_sampler
from fp4rl.rl.losses import LossRule
from fp4rl.rl.phases import Phases
from fp4rl.rl.reference import ReferencePolicies
from fp4rl.rl.rewards import Rewarder
from fp4rl.rl.stream import PromptStream
from fp4rl.spec.training import Training


@dataclass(frozen=True)
class Hooks:
    """Who hears what. `on_step(steps done, metrics)` returns whether to stop. `on_begin` comes after a checkpoint was
    loaded, `on_checkpoint(steps done, its folder)` after one was written. `on_boundary(steps done)`, after the last
    update from a rollout, returns whether to write a checkpoint and whether to stop."""

    on_step: Callable[[int, dict[str, float]], bool]
    on_begin: Callable[[Any], None]
    on_boundary: Callable[[int], tuple[bool, bool]]
    on_checkpoint: Callable[[int, Path], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class TrainerComponents:
    """What a trainer is made of besides the model. `float_masters`: updates are made to weights in FP32."""

    recipe: Training
    rule: LossRule
    stream: PromptStream
    rewarder: Rewarder
    phases: Phases
    standing: ReferencePolicies
    hooks: Hooks
    seed: int
    float_masters: bool = True
    sampler: Sampler = transformers_sampler
