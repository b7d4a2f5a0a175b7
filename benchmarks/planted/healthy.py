"""Healthy runs of the embedded model, no two with the same settings: each dial is drawn by the run's number."""

from random import Random
from typing import Any

ALGORITHMS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
MODES = (None, None, "w4a16", "w4a16", "w4a4", "w4a8")
# (difficulty, training problems): difficulty 1 has 899 of them in all.
TASKS = ((1, 512), (2, 4096))
# Three steps of 128 answers vary by less than this share of right ones.
NOISE = 0.05


def setting(number: int, steps: int) -> dict[str, Any]:
    """The description of healthy run `number`."""
    dial = Random(number)
    difficulty, problems = dial.choice(TASKS)
    mode, lora = dial.choice(MODES), dial.random() < 1 / 6
    described: dict[str, Any] = {
        "model": {
            "embedded": {"seed": dial.randrange(3)},
            "dtype": "bfloat16" if dial.random() < 1 / 8 else "float32",
            **({"lora": {"rank": 16, "alpha": 32}} if lora else {}),
        },
        "task": {"name": "arithmetic", "difficulty": difficulty, "train_count": problems},
        "training": {
            "steps": steps,
            "algorithm": dial.choice(ALGORITHMS),
            "lr": dial.choice((1e-3, 2e-3)) if lora else dial.choice((1e-4, 2e-4, 4e-4)),
            "lr_scheduler": dial.choice(("constant", "cosine")),
            "mini_batch_size": dial.choice((4, 8, 16)),
            "temperature": dial.choice((0.8, 1.0)),
            "mask_truncated": dial.random() < 1 / 4,
            "filter_groups": {"enable": dial.random() < 2 / 3},
            "rollout_correction": {"rollout_is": dial.choice(("none", "none", "token", "sequence"))},
            "kl_loss_coef": dial.choice((0.0, 0.0, 0.0, 0.01)),
        },
        "evaluation": {"count": 120, "profiles": ["deployment"], "test_freq": dial.choice((0, 10))},
        "seed": number,
    }
    if mode is not None:
        described["injection"] = {"mode": mode, "preset": "vllm"}
        if dial.random() < 1 / 3:
            described["noise"] = {"schedule": {"kind": "geometric", "sigma_start": 1e-2, "sigma_end": 5e-4}}
        if dial.random() < 1 / 6:
            described["training"]["distillation"] = {"coef": 0.5}
    return described


def was_healthy(rows: list[tuple[int, dict[str, float]]]) -> bool:
    """Whether the accuracy of the rollouts did not fall from the first three steps to the last three."""
    accuracy = [metrics["accuracy/rollout"] for _, metrics in rows]
    return sum(accuracy[-3:]) / 3 >= sum(accuracy[:3]) / 3 - NOISE
