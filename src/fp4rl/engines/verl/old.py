"""Settings of the verl fork that this work grew from, and of its scripts, as parts of a description.

`translate` reads what the fork added (errors, noise, noisy operators); `recipe` reads verl's own keys, with the values
that verl gave where a script named none.
"""

import re
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from fp4rl.engines.verl.keys import ACTOR, CORRECTION, MODEL, NO_DUAL_CLIP, OVERLONG, ROLLOUT, SAME
from fp4rl.spec import legacy
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.legacy_noise import EPOCHS
from fp4rl.spec.load import parse
from fp4rl.spec.noise import Noise
from fp4rl.spec.plain_yaml import plain_values

_ADDED = ("hw_error_injection", "noise_injection", "noisy_ops.")
_SWITCHES = {"enabled": "ENABLED", "error_scale": "SCALE", "error_type": "TYPE"}  # trainer.noisy_ops: the variables'
_SWALLOWED = 2.0**-8  # half of BF16's step just above 1, near which weights of norms lie
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_BOUNDS = re.compile(r"[\d.]+_[\d.]+")
_STEPS = "trainer.total_training_steps"
_RENAMED = {
    f"{ACTOR}.grad_clip": f"{ACTOR}.optim.clip_grad",
    f"{ACTOR}.optim.warmup_style": f"{ACTOR}.optim.lr_scheduler_type",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.max_resp_len": "reward.reward_kwargs.max_resp_len",
    **{
        f"{above}.{key}": f"{OVERLONG}.{key}"
        for above in ("reward_model.overlong_buffer", "reward_model.reward_kwargs.overlong_buffer_cfg")
        for key in ("enable", "len", "penalty_factor", "log")
    },
}
# Keys that decide no result, or only where a run's files lie.
AROUND = (
    *("trainer.project_name", "trainer.experiment_name", "trainer.logger", "trainer.default_local_dir"),
    *(
        "trainer.n_gpus_per_node",
        "trainer.nnodes",
        "trainer.device",
        "trainer.critic_warmup",
        "trainer.val_before_train",
    ),
    *("trainer.resume_mode", "trainer.balance_batch", "trainer.log_val_generations", "trainer.total_epochs"),
    *("data.filter_overlong_prompts", "data.truncation", "data.train_files", "data.val_files", "data.gen_batch_size"),
    "algorithm.use_kl_in_reward",
    *(f"{OVERLONG}.log", "reward.reward_kwargs.max_resp_len", "reward.reward_manager.name"),
    *(f"{MODEL}.use_remove_padding", f"{ACTOR}.fsdp_config.", f"{ACTOR}.use_dynamic_bsz", f"{ACTOR}.strategy"),
    *(f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.use_torch_compile", "actor_rollout_ref.ref."),
    *(f"{ROLLOUT}.log_prob_", f"{ROLLOUT}.tensor_model_parallel_size", f"{ROLLOUT}.name", f"{ROLLOUT}.enforce_eager"),
    *(f"{ROLLOUT}.enable_chunked_prefill", f"{ROLLOUT}.gpu_memory_utilization", f"{ROLLOUT}.free_cache_engine"),
    *(f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.mode", f"{ROLLOUT}.load_format", f"{ROLLOUT}.layered_summon"),
)


def is_added(key: str) -> bool:
    """Return whether the fork added a setting: `hw_error_injection`, `noise_injection`, `noisy_ops`."""
    return key.startswith(legacy.PREFIX) or any(family in key for family in _ADDED)


def translate(old: Mapping[str, Any], env: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return `injection` and `noise` of a description, as far as the settings speak of them, and a line for each trap.

    `old`: settings by dotted key, a whole configuration too; `env`: variables. Nothing in either that the fork added:
    nothing is returned. Raises InvalidValueError for an unknown key of the fork, and for what never could act.
    """
    present = {_plain(key): value for key, value in old.items() if is_added(key) or key.endswith(EPOCHS)}
    present |= {key: value for key, value in env.items() if is_added(key)}
    for key in [key for key in present if "noisy_ops." in key]:  # the trainer set the variables by these
        value, last = present.pop(key), key.rpartition(".")[2]
        if last in _SWITCHES:
            present.setdefault(f"{legacy.PREFIX}{_SWITCHES[last]}", str(value))
    if not any(is_added(key) for key in present):
        return {}, ()
    translation = legacy.translate(present)
    return translation.fragment(), (*translation.warnings, *_of_noise(translation.noise, old))


def require_agreement(experiment: Experiment, old: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the lines of settings of the fork that stand beside an experiment, none where there are none.

    Raises InvalidValueError where they describe something else: one of the two would be without effect.
    """
    parts, lines = translate(old, env)
    theirs = parse(Experiment, experiment.model_dump(mode="json") | parts, "settings of the verl fork")
    for key in parts:
        if getattr(theirs, key) != getattr(experiment, key):
            raise InvalidValueError(
                f"settings of the verl fork beside the experiment describe another {key}; take them out, or their "
                f"values into the experiment (`fp4rl verl-config --from` prints them)"
            )
    return lines


def flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value for everything below nested keys."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _of_noise(noise: Noise | None, old: Mapping[str, Any]) -> list[str]:
    if noise is None:
        return []
    last = getattr(noise.schedule, "sigma_end", 0.0)
    lines = []
    if last < _SWALLOWED:
        lines.append(
            f"BF16 swallows most noise below {_SWALLOWED:.4f} on weights near 1, and sigma_end is {last:g}: "
            "`fp4rl schedule` shows the steps, noise.precision: float32 keeps it (in `fp4rl run`)"
        )
    steps = _value(old.get(_STEPS))
    if isinstance(steps, int) and steps < noise.schedule.steps_for_all:
        lines.append(f"{steps} steps do not reach every sigma of a schedule of {noise.schedule.steps_for_all}")
    return lines


def recipe(old: Mapping[str, Any], rows: int | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return model, training, evaluation and seed of a description from verl's own keys, and a line for what is lost.

    `rows`: problems in `data.train_files`, where `trainer.total_epochs` alone says how long a run is.
    """
    named = {_RENAMED.get(_plain(key), _plain(key)): _value(value) for key, value in old.items() if not is_added(key)}
    lines = list(_lost(named))
    parts: dict[str, Any] = {}
    for same in SAME:
        if same.verl in named or same.default is not None:
            _put(parts, same.spec, named.pop(same.verl, same.default))
    training = parts["training"]
    clip = named.pop(f"{ACTOR}.clip_ratio", None)
    if clip is not None and {clip} != {training["clip_ratio_low"], training["clip_ratio_high"]}:
        lines.append(f"clip_ratio {clip} did nothing beside clip_ratio_low and clip_ratio_high, which verl always sets")
    lines += _settle(parts, named, rows)
    left = sorted(key for key in named if not key.startswith(AROUND))
    if left:
        lines.append(f"no counterpart in a description, write them behind the script's own: {', '.join(left)}")
    return parts, tuple(lines)


def _settle(parts: dict[str, Any], named: dict[str, Any], rows: int | None) -> list[str]:
    """Bring values into a description's words; take what is used out of `named`, return what has to be named."""
    training, lines = parts["training"], []
    dapo = training["filter_groups"]["enable"] or named.get(f"{OVERLONG}.enable", False)
    modes = {"gspo": "gspo", "cispo": "cispo"}
    training["algorithm"] = modes.get(named.pop(f"{ACTOR}.policy_loss.loss_mode", ""), "dapo" if dapo else "grpo")
    if (micro := named.pop(f"{ACTOR}.ppo_micro_batch_size_per_gpu", None)) is not None:
        training["micro_batch_size"] = micro
    if not named.pop(f"{ACTOR}.use_kl_loss", False):
        training["kl_loss_coef"] = 0.0
    training["lr_warmup_steps"] = max(0, training["lr_warmup_steps"])
    parts["evaluation"]["test_freq"] = max(0, parts["evaluation"]["test_freq"])
    if training["clip_ratio_c"] >= NO_DUAL_CLIP:
        training["clip_ratio_c"] = None
    if training["filter_groups"]["max_num_gen_batches"] <= 0:
        del training["filter_groups"]["max_num_gen_batches"]
    buffer = {key: named.pop(f"{OVERLONG}.{key}", None) for key in ("enable", "len", "penalty_factor")}
    training["overlong_buffer"] = {"enable": False} | {k: v for k, v in buffer.items() if v is not None}
    level = named.pop(f"{CORRECTION}.rollout_is", None)
    if level is not None:
        training["rollout_correction"] = {"rollout_is": level} | _threshold(named)
    parts["model"] = {"path": named.pop(f"{MODEL}.path", "NAME A FOLDER"), "dtype": "bfloat16"}
    if rank := named.pop(f"{MODEL}.lora_rank", 0):
        parts["model"]["lora"] = {"rank": rank, "alpha": named.pop(f"{MODEL}.lora_alpha", 16)}
        if (names := named.pop(f"{MODEL}.target_modules", "all-linear")) != "all-linear":
            parts["model"]["lora"]["target_modules"] = names
    lines += _steps(training, named, rows)
    if not 0 < training["save_freq"] < (training["steps"] or inf):
        training["save_freq"] = 0  # both keep the last step
    lines.append("name the task: verl's Parquet has prompts that are rendered already (task: {name: gsm8k, path: ...})")
    return lines


def _threshold(named: dict[str, Any]) -> dict[str, Any]:
    given = named.pop(f"{CORRECTION}.rollout_is_threshold", 2.0)
    if isinstance(given, int | float):
        return {"threshold": float(given)}
    low, high = map(float, str(given).split("_"))
    if abs(low * high - 1) > 1e-6:
        raise InvalidValueError(
            f"{CORRECTION}.rollout_is_threshold {given}: a description's bounds are 1/T and T; take one T"
        )
    return {"mode": "mask", "threshold": high}


def _steps(training: dict[str, Any], named: Mapping[str, Any], rows: int | None) -> list[str]:
    if "steps" in training:
        return []
    epochs, batch = (
        named.get("trainer.total_epochs", 30),
        named.get("data.gen_batch_size") or training["train_batch_size"],
    )
    if rows is not None:
        training["steps"] = rows // batch * epochs
        return [f"steps: {epochs} x {rows} problems, {batch} at a time (fewer where groups were replaced)"]
    training["steps"] = None
    return [f"name training.steps: {epochs} epochs of the rows in data.train_files, {batch} prompts at a time"]


def _lost(named: Mapping[str, Any]) -> list[str]:
    estimator = named.get("algorithm.adv_estimator", "gae")
    if estimator == "gae":
        raise InvalidValueError("algorithm.adv_estimator gae (verl's default) needs a critic, which fp4rl has not")
    if named.get("algorithm.use_kl_in_reward"):
        raise InvalidValueError(
            "algorithm.use_kl_in_reward: fp4rl has the KL in the loss; set use_kl_loss, and this to False"
        )
    clip = named.get(f"{ACTOR}.clip_ratio_c", 3.0)
    return [f"verl bounded ratios of negative advantages by {clip} unasked; kept as clip_ratio_c"]


def _plain(key: str) -> str:
    return key.lstrip("+~'\" ")


def _value(value: Any) -> Any:
    """Return what a setting's text means; YAML reads 1e-5 as a text, and two bounds such as 0.5_5 as a number."""
    if not isinstance(value, str) or _BOUNDS.fullmatch(value):
        return value
    value = plain_values(value, "a setting")
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _put(parts: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        parts = parts.setdefault(part, {})
    parts[last] = value


def is_recipe(old: Mapping[str, Any]) -> bool:
    """Return whether settings say how a policy is trained, besides what the fork added."""
    return any(_plain(key) in {same.verl for same in SAME} for key in old)


def rows_of(named: Mapping[str, Any]) -> int | None:
    """Return the number of rows in `data.train_files`, None where that is no Parquet file on this machine."""
    import pyarrow.parquet as pq

    file = Path(str(next((value for key, value in named.items() if _plain(key) == "data.train_files"), "")))
    return pq.ParquetFile(file).metadata.num_rows if file.suffix == ".parquet" and file.is_file() else None
