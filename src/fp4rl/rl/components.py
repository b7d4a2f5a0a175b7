"""What a trainer is made of besides the model, so that the file that imports TRL holds nothing else.

A recipe is translated to TRL's `GRPOConfig`; everything that is not named in `arguments` stays at TRL's default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fp4rl.rl.events import Emit
from fp4rl.rl.fill import PromptStream
from fp4rl.rl.generate import Sampler, transformers_sampler
from fp4rl.rl.masters import Masters
from fp4rl.rl.phases import Phases
from fp4rl.rl.processes import device
from fp4rl.rl.reference import FrozenPolicy
from fp4rl.rl.rewards import Rewarder
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.training import OPTIMIZERS_OF, Training


class Supervisor(Protocol):
    """Decides between the steps of a trainer, and keeps what a checkpoint needs besides the trainer's own files."""

    def on_begin(self, trainer: Any) -> None:
        """Begin, once model, optimizer and scheduler exist and those of a checkpoint are loaded."""

    def on_gradients(self) -> None:
        """Take note of the whole gradient of an update, before it is clipped."""

    def on_update(self) -> dict[str, float]:
        """Take note of an optimizer update that was just made; return metrics of it."""
        ...

    def on_step(self, step: int, metrics: dict[str, float]) -> bool:
        """Take the metrics of a step; return whether to stop."""
        ...

    def on_boundary(self, step: int) -> tuple[bool, bool]:
        """Return, after the last update of a step, whether to write a checkpoint, and whether to stop."""
        ...

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Complete a checkpoint, whose trainer's files are in `folder` already."""


@dataclass(frozen=True)
class TrainerComponents:
    """What a trainer is made of besides the model. `masters` makes the FP32 copies that the optimizer updates."""

    recipe: Training
    stream: PromptStream
    rewarder: Rewarder
    phases: Phases
    reference: FrozenPolicy | None
    teacher: FrozenPolicy | None
    supervisor: Supervisor
    emit: Emit
    seed: int
    masters: Callable[[nn.Module], Masters | None] = Masters.of
    sampler: Sampler = transformers_sampler


def arguments(recipe: Training, folder: Path, seed: int, processes: int = 1) -> dict[str, Any]:
    """Return the keyword arguments of `GRPOConfig`. `folder` gets the checkpoints; TRL itself deletes none of them.

    Batches are those of all `processes` together, which must divide them evenly (`require_shares`).

    `beta` stays 0: the KL is in fp4rl's own loss. A step of TRL is one update, a step of fp4rl a batch of rollouts.
    """
    updates, share = recipe.updates_per_step, recipe.mini_batch_size * recipe.rollout_n // processes
    micro = recipe.micro_batch_size or share
    return {
        "output_dir": str(folder),
        "max_steps": recipe.steps * updates,
        "max_completion_length": recipe.max_response_length,
        "temperature": recipe.temperature,
        "top_p": recipe.top_p,
        "beta": 0.0,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "use_cpu": device().type == "cpu",
        "bf16": False,
        "seed": seed,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "steps_per_generation": updates * share // micro,
        "num_generations": recipe.rollout_n,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": "constant_with_warmup" if recipe.lr_scheduler == "constant" else recipe.lr_scheduler,
        "warmup_steps": recipe.lr_warmup_steps * updates,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        **({} if recipe.optimizer == "adamw" else {"optim": recipe.optimizer}),
        "max_grad_norm": recipe.grad_clip,
        # At rollout boundaries only: in between, a batch of answers would have to be saved too.
        "save_strategy": "steps" if recipe.save_freq else "no",
        **({"save_steps": recipe.save_freq * updates} if recipe.save_freq else {}),
        "ignore_data_skip": True,  # problems come from fp4rl's own stream; TRL's loader only counts
    }


def require_optimizer(name: str) -> None:
    """Raise NotFoundError for an optimizer whose package is not installed here."""
    package = OPTIMIZERS_OF.get(name)
    if package is not None and find_spec(package) is None:
        raise NotFoundError(
            f"training.optimizer {name} is of {package}, which is not installed: pip install {package}, or take adamw"
        )


def require_processes(experiment: Experiment, count: int) -> None:
    """Raise InvalidValueError for what `count` processes cannot do together, and where the experiment asks for another
    number of them (1: as many as a launcher gives)."""
    if experiment.processes not in (1, count):
        raise InvalidValueError(
            f"the experiment asks for {experiment.processes} processes and this is one of {count}: `fp4rl run` starts "
            f"them itself; under torchrun write --nproc-per-node {experiment.processes}"
        )
    if count > 1 and experiment.rollout.engine != "transformers":
        raise InvalidValueError(
            f"rollout.engine {experiment.rollout.engine} takes its weights from one process, and this run has {count}; "
            "take transformers, or one process"
        )
    require_shares(experiment.training, count)


def require_own_engine(experiment: Experiment) -> None:
    """Raise InvalidValueError for an experiment that another engine than TRL trains."""
    if experiment.engine != "trl":
        raise InvalidValueError(
            f"engine {experiment.engine} trains in processes of its own; `fp4rl runs import` takes its finished run in"
        )


def require_shares(recipe: Training, processes: int) -> None:
    """Raise InvalidValueError for a recipe that several processes cannot run like a single one."""
    for why in recipe.not_shared(processes):
        raise InvalidValueError(why)
