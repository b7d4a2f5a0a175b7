"""Settings that mean the same in verl and in a description, and the value that verl 0.9.1 gives where none is named."""

from dataclasses import dataclass
from typing import Any

ACTOR, ROLLOUT, MODEL, REF = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model", "ref"))
OVERLONG = "reward.reward_kwargs.overlong_buffer_cfg"
CORRECTION = "algorithm.rollout_correction"
FILTER = "algorithm.filter_groups"

NO_DUAL_CLIP = 1e9
"""verl always bounds the ratios of negative advantages, by 3 unasked; its ratios end at e^20, half of this."""


@dataclass(frozen=True)
class Same:
    """One setting under both names; `default` is verl's."""

    verl: str
    spec: str
    default: Any


SAME = (
    Same("data.train_batch_size", "training.train_batch_size", 1024),  # prompts in both
    Same("data.max_prompt_length", "training.max_prompt_length", 512),
    Same("data.max_response_length", "training.max_response_length", 512),
    Same(f"{ROLLOUT}.n", "training.rollout_n", 1),
    Same(f"{ROLLOUT}.temperature", "training.temperature", 1.0),
    Same(f"{ROLLOUT}.top_p", "training.top_p", 1.0),
    Same(f"{ACTOR}.ppo_mini_batch_size", "training.mini_batch_size", 256),  # prompts in both
    Same(f"{ACTOR}.optim.lr", "training.lr", 1e-6),
    Same(f"{ACTOR}.optim.lr_warmup_steps", "training.lr_warmup_steps", -1),
    Same(f"{ACTOR}.optim.lr_scheduler_type", "training.lr_scheduler", "constant"),
    Same(f"{ACTOR}.optim.weight_decay", "training.weight_decay", 0.01),
    Same(f"{ACTOR}.optim.clip_grad", "training.grad_clip", 1.0),
    Same(f"{ACTOR}.clip_ratio_low", "training.clip_ratio_low", 0.2),
    Same(f"{ACTOR}.clip_ratio_high", "training.clip_ratio_high", 0.2),
    Same(f"{ACTOR}.clip_ratio_c", "training.clip_ratio_c", 3.0),
    Same(f"{ACTOR}.loss_agg_mode", "training.loss_agg_mode", "token-mean"),
    Same(f"{ACTOR}.entropy_coeff", "training.entropy_coeff", 0),
    Same(f"{ACTOR}.kl_loss_coef", "training.kl_loss_coef", 0.001),
    Same(f"{ACTOR}.kl_loss_type", "training.kl_loss_type", "low_var_kl"),
    Same("algorithm.adv_estimator", "training.adv_estimator", "gae"),
    Same("algorithm.norm_adv_by_std_in_grpo", "training.norm_adv_by_std", True),
    Same(f"{FILTER}.enable", "training.filter_groups.enable", False),
    Same(f"{FILTER}.metric", "training.filter_groups.metric", "reward"),
    Same(f"{FILTER}.max_num_gen_batches", "training.filter_groups.max_num_gen_batches", 0),
    Same(f"{MODEL}.enable_gradient_checkpointing", "training.gradient_checkpointing", True),
    Same("trainer.total_training_steps", "training.steps", None),
    Same("trainer.save_freq", "training.save_freq", -1),
    Same("trainer.test_freq", "evaluation.test_freq", -1),
    Same("data.seed", "seed", None),
)
