"""Healthy runs of the embedded model, no two with the same settings: each dial is drawn by the run's number.

What acts in a run and how many answers a step has go in turn, so that any forty runs in a row hold every class.
"""

from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from typing import Any

ALGORITHMS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
# Rows with their steps done and metrics.
Rows = list[tuple[int, dict[str, float]]]
# (difficulty, training problems): difficulty 1 has 899 of them in all.
TASKS = ((1, 512), (2, 4096))

AQN: Mapping[str, Any] = MappingProxyType({"kind": "geometric", "sigma_end": 5e-4})
ERRORS = ({"kind": "relative", "point": "matmul", "scale": 0.05},)
"""Five per cent of noise on every result of a matmul of a linear layer."""

CLASSES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bf16": {},
        "w4a16": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}},
        "aqn alone": {"noise": AQN},
        "w4a4": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
        "matmul noise": {"injection": {"errors": ERRORS}},
        "w4a8": {"injection": {"mode": "w4a8", "deployment": "compressed_tensors"}},
        "w4a4+aqn": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}, "noise": AQN},
        "matmul noise+aqn": {"injection": {"errors": ERRORS}, "noise": AQN},
        "stochastic w4a16": {"injection": {"weight": "mxfp4_sr"}},
        "w4a16+matmul noise": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors", "errors": ERRORS}},
        "w4a16+aqn": {"injection": {"mode": "w4a16", "deployment": "compressed_tensors"}, "noise": AQN},
        "stochastic w4a4+aqn": {"injection": {"weight": "mxfp4_sr", "input": "mxfp4_sr"}, "noise": AQN},
        "matmul noise in the rollout": {"injection": {"errors": ERRORS, "apply_during": {"errors": ["rollout"]}}},
    }
)
"""What acts -> that part of the description."""

SIZES = ((8, 8), (1, 4), (4, 8), (1, 8), (8, 8), (2, 4), (4, 8), (4, 2))
"""(prompts a step, answers a prompt): 64 or 32 answers, and 4 or 8 as on one small GPU."""


SMALL = 8
"""Answers a step up to which a run counts as one of few."""


def setting(number: int, steps: int) -> dict[str, Any]:
    """The description of healthy run `number`. Small batches get a rate that they can bear."""
    dial = Random(number)
    acts = list(CLASSES)[number % len(CLASSES)]
    prompts, answers = SIZES[number % len(SIZES)]
    small = prompts * answers <= SMALL
    difficulty, problems = dial.choice(TASKS)
    lora = dial.random() < 1 / 5
    rates = ((5e-4, 1e-3), (2e-5, 5e-5)) if small else ((1e-3, 2e-3), (1e-4, 2e-4, 4e-4))
    described: dict[str, Any] = {
        "model": {
            "embedded": {"seed": dial.randrange(3)},
            "dtype": "bfloat16" if dial.random() < 1 / 5 else "float32",
            **({"lora": {"rank": 16, "alpha": 32}} if lora else {}),
        },
        "task": {"name": "arithmetic", "difficulty": difficulty, "train_count": problems},
        "training": {
            "steps": steps,
            "train_batch_size": prompts,
            "rollout_n": answers,
            "mini_batch_size": prompts // dial.choice((1, 2, 4) if prompts >= 4 else (1,)),
            "algorithm": dial.choice(ALGORITHMS),
            "lr": dial.choice(rates[0] if lora else rates[1]),
            "lr_scheduler": dial.choice(("constant", "cosine")),
            "temperature": dial.choice((0.8, 1.0)),
            "mask_truncated": dial.random() < 1 / 4,
            "filter_groups": {"enable": dial.random() < (1 / 4 if small else 2 / 3)},
            "rollout_correction": {"rollout_is": dial.choice(("none", "none", "token", "sequence"))},
            "kl_loss_coef": dial.choice((0.0, 0.0, 0.0, 0.01)),
        },
        "evaluation": {"count": 120, "profiles": ["deployment"], "test_freq": dial.choice((0, 10))},
        "seed": number,
        **{key: dict(value) for key, value in CLASSES[acts].items()},
    }
    if "noise" in described:
        described["noise"] = {"schedule": {**AQN, "sigma_start": dial.choice((1e-2, 2e-2, 5e-2))}}
    if "mode" in described.get("injection", {}) and dial.random() < 1 / 6:
        described["training"]["distillation"] = {"coef": 0.5}
    return described


def acts_in(number: int) -> str:
    """The name of what acts in healthy run `number`."""
    return list(CLASSES)[number % len(CLASSES)]


def was_healthy(rows: Rows) -> bool:
    """Whether accuracy at the end is what it was in the beginning, or above: a tenth of the run each, at least three
    steps, and all within twice their sampling error (answers of one prompt count as half independent)."""
    accuracy = [metrics["accuracy/rollout"] for _, metrics in rows]
    answers, groups = (rows[0][1][f"rollout/{name}"] for name in ("answers", "groups"))
    span = max(3, len(rows) // 10)
    before, after = sum(accuracy[:span]) / span, sum(accuracy[-span:]) / span
    p = (before + after) / 2
    independent = span * answers / (1 + (answers / groups - 1) / 2)
    return after >= before - 2 * (2 * p * (1 - p) / independent) ** 0.5
