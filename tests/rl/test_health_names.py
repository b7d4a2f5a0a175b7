"""The monitor finds its signals under the names of other trainers, older versions and reward functions of one's own."""

import pytest

from fp4rl.rl.health.signals import signals_of


@pytest.mark.parametrize(
    "logged, signals",
    [
        # TRL 1.16
        ({"reward": 1.5, "rewards/check/mean": 0.5, "completions/mean_length": 9.0}, {"reward": 1.5, "length": 9.0}),
        ({"rewards/my_accuracy/mean": 0.5, "rewards/form/mean": 1.0}, {"accuracy": 0.5, "reward": 1.5}),
        ({"rewards/check/mean": 0.5, "rewards/check/std": 9.0}, {"reward": 0.5}),
        ({"eval_rewards/is_correct/mean": 0.25, "eval_reward": 2.0}, {"validation": 0.25}),
        # TRL 0.14 and ms-swift 3
        ({"completion_length": 9.0, "reward": 1.0}, {"length": 9.0, "reward": 1.0}),
        ({"rewards/MathAccuracy": 0.5, "response_clip_ratio": 0.25, "reward": 1.0},
         {"accuracy": 0.5, "truncated": 0.25, "reward": 1.0}),
        # what TensorBoard and W&B show of a Hugging Face trainer
        ({"train/reward": 1.0, "train/rewards/accuracy_reward/mean": 0.5, "train/grad_norm": 2.0, "train/loss": 3.0},
         {"reward": 1.0, "accuracy": 0.5, "grad_norm": 2.0, "loss": 3.0}),
        ({"eval/rewards/accuracy_reward/mean": 0.5}, {"validation": 0.5}),
        # rewards of any name
        ({"rollout/raw_reward": 0.5}, {"reward": 0.5}),
        ({"mean_reward": 0.5}, {"reward": 0.5}),
        ({"train/reward_mean": 0.5, "eval/reward_mean": 0.9, "reward_std": 0.1}, {"reward": 0.5}),
        # verl's stay what they were
        ({"critic/rewards/mean": 0.5, "critic/score/mean": 0.25, "val-core/x/acc/mean@1": 0.75},
         {"reward": 0.5, "validation": 0.75}),
    ],
)  # fmt: skip
def test_signals_are_found_under_the_names_that_trainers_log(logged, signals):
    """Names of other trainers, of older versions, with the phase before them, and of any reward function."""
    assert signals_of(logged) == signals
