"""A recipe in the words of TRL's `GRPOConfig`; everything that is not named here stays TRL's own."""

from pathlib import Path
from typing import Any

import torch

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.training import Training


def arguments(recipe: Training, folder: Path, seed: int, processes: int = 1) -> dict[str, Any]:
    """Keyword arguments of `GRPOConfig`. `folder` gets the checkpoints; which of them stay is not TRL's to say.

    Batches are those of all `processes` together, which must be able to share them (`require_shares`).

    `beta` stays 0: the reference belongs to our own loss. A TRL step is one update, ours is a batch of rollouts.
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
        "use_cpu": not torch.cuda.is_available(),
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
        "max_grad_norm": recipe.grad_clip,
        # At rollout boundaries alone: in between, a batch of answers would have to be saved too.
        "save_strategy": "steps" if recipe.save_freq else "no",
        **({"save_steps": recipe.save_freq * updates} if recipe.save_freq else {}),
        "ignore_data_skip": True,  # problems come from our own stream; TRL's loader only counts
    }


def require_shares(recipe: Training, processes: int) -> None:
    """Raises InvalidValueError for what several processes cannot do as one would."""
    share, rest = divmod(recipe.mini_batch_size * recipe.rollout_n, processes)
    micro = recipe.micro_batch_size or share
    if recipe.train_batch_size % processes or rest or share % micro:
        raise InvalidValueError(
            f"{processes} processes cannot share train_batch_size {recipe.train_batch_size}, mini_batch_size "
            f"{recipe.mini_batch_size} x rollout_n {recipe.rollout_n} and micro_batch_size {micro} evenly; "
            f"take multiples of {processes}"
        )
    if processes > 1 and recipe.adv_estimator == "reinforce_plus_plus_baseline":
        raise InvalidValueError(
            "adv_estimator reinforce_plus_plus_baseline divides by the spread of the whole batch, of which each of "
            f"{processes} processes has a share: take grpo or rloo"
        )
