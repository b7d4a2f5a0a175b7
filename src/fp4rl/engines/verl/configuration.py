"""From an experiment to verl's configuration: every key that decides a result is named, also where verl's default is
the same, so that another version of verl cannot change it."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from fp4rl.engines.verl import settings
from fp4rl.engines.verl.beyond import rounding_rollouts
from fp4rl.engines.verl.keys import ACTOR, CORRECTION, FILTER, MODEL, NO_DUAL_CLIP, OVERLONG, REF, ROLLOUT, SAME
from fp4rl.engines.verl.machines import Machine
from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.idle import value_at
from fp4rl.spec.training import Training

MICRO = 8
"""Answers of one backward pass where the experiment names none; memory is all that it decides."""

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_FILTER_METRICS = {
    "score": "score",
    "acc": "acc",
    "reward": "reward",
}  # `reward` is verl's own, the others our reward's

_OF_THE_RUN = ("trainer.save_freq", "trainer.test_freq")  # they change no result


@dataclass(frozen=True)
class Files:
    """What is written beside each other: the shell script, both splits in verl's columns, and the experiment."""

    script: Path

    def beside(self, ending: str) -> Path:
        """Return the file of the same name with another ending."""
        return self.script.absolute().with_name(f"{self.script.stem}.{ending}")

    @property
    def train(self) -> Path:
        """The problems of the train split."""
        return self.beside("train.parquet")

    @property
    def validation(self) -> Path:
        """The problems of `evaluation.split`."""
        return self.beside("val.parquet")

    @property
    def spec(self) -> Path:
        """The one experiment, for the plug-in."""
        return self.beside("spec.yaml")

    @property
    def run(self) -> Path:
        """The folder of the run: verl's checkpoints, and what `fp4rl runs import` reads."""
        return self.beside("run")


def configuration(run: PlannedRun, machine: Machine, devices: int, files: Files, template: str) -> dict[str, Any]:
    """Return verl's keys and their values for one run; a key that its configuration lacks begins with `+`.

    `devices`: processes of the one node that is written for. `template` renders a prompt (`data.chat_template`).
    """
    experiment = run.experiment
    chosen: dict[str, Any] = {same.verl: value_at(experiment, same.spec) for same in SAME}
    chosen |= decided(experiment) | _sampling(experiment, template)
    chosen |= _batches(experiment.training, devices) | _data(files) | _reward(experiment.training)
    chosen |= _trainer(run, devices, files)
    chosen |= dict(machine.settings) | _plug_in(files)
    if "+ray_kwargs.ray_init.num_gpus" in chosen:
        chosen["+ray_kwargs.ray_init.num_gpus"] = devices
    return dict(sorted(chosen.items(), key=lambda item: item[0].lstrip("+")))


def decided(experiment: Experiment) -> dict[str, Any]:
    """Return the keys whose values the experiment alone decides: a run with others would be another experiment's."""
    chosen: dict[str, Any] = {
        same.verl: value_at(experiment, same.spec) for same in SAME if same.verl not in _OF_THE_RUN
    }
    if rounding_rollouts(experiment):
        chosen[f"{ROLLOUT}.enforce_eager"] = True  # in a captured graph the rounding of inputs would be lost
    return chosen | _loss(experiment.training) | _model(experiment) | _correction(experiment)


def per_device(recipe: Training, devices: int) -> int:
    """Return the answers of one update on each device."""
    return recipe.mini_batch_size * recipe.rollout_n // devices


def micro_batch(recipe: Training, devices: int) -> int:
    """Return the answers of one backward pass: at most what is asked for, and such that they divide evenly."""
    share = per_device(recipe, devices)
    largest = min(share, recipe.micro_batch_size or MICRO)
    return next(size for size in range(largest, 0, -1) if share % size == 0)


def policy_loss(recipe: Training) -> str | None:
    """Return verl's name of a policy loss; None where it has none that means the same."""
    published = recipe.published
    known = {("token", "ppo"): "vanilla", ("sequence", "ppo"): "gspo", ("token", "cispo"): "cispo"}
    return known.get((published.ratio_level, published.clipping))


def lora_alpha(rank: int, alpha: float, *, rslora: bool) -> float:
    """Return the alpha that gives the same scale under alpha / rank, the only rule that verl has."""
    return alpha * sqrt(rank) if rslora else alpha


def _loss(recipe: Training) -> dict[str, Any]:
    effective, longest = recipe.effective(), recipe.max_response_length
    return {
        f"{ACTOR}.policy_loss.loss_mode": policy_loss(recipe),
        f"{ACTOR}.clip_ratio": effective["clip_ratio_low"],
        f"{ACTOR}.clip_ratio_low": effective["clip_ratio_low"],
        f"{ACTOR}.clip_ratio_high": effective["clip_ratio_high"],
        f"{ACTOR}.clip_ratio_c": recipe.clip_ratio_c or NO_DUAL_CLIP,
        f"{ACTOR}.loss_agg_mode": effective["loss_agg_mode"],
        # without it verl divides by the longest answer of each micro-batch, not by the limit
        f"{ACTOR}.loss_scale_factor": longest if effective["loss_agg_mode"] == "seq-mean-token-sum-norm" else None,
        f"{ACTOR}.use_kl_loss": recipe.kl > 0,
        f"{ACTOR}.kl_loss_coef": recipe.kl,
        f"{ACTOR}.ppo_epochs": 1,
        f"{ACTOR}.shuffle": False,
        f"{ACTOR}.optim.lr_scheduler_type": recipe.lr_scheduler.removesuffix("_with_warmup"),
        f"{ACTOR}.optim.lr_warmup_steps_ratio": 0.0,
        f"{ACTOR}.optim.min_lr_ratio": 0.0,
        "algorithm.norm_adv_by_std_in_grpo": effective["norm_adv_by_std"],
        "algorithm.use_kl_in_reward": False,
        f"{FILTER}.enable": recipe.filters,
        f"{FILTER}.metric": _FILTER_METRICS[recipe.filter_groups.metric],
    }


def _sampling(experiment: Experiment, template: str) -> dict[str, Any]:
    evaluation, recipe, engine = experiment.evaluation, experiment.training, experiment.rollout
    several = evaluation.samples > 1
    return {
        f"{ROLLOUT}.top_k": -1,
        f"{ROLLOUT}.dtype": experiment.model.dtype,
        f"{ROLLOUT}.seed": experiment.seed,
        f"{ROLLOUT}.calculate_log_probs": True,
        f"{ROLLOUT}.gpu_memory_utilization": engine.gpu_memory_utilization or 0.5,
        f"{ROLLOUT}.max_model_len": engine.max_model_len or recipe.max_prompt_length + recipe.max_response_length,
        f"{ROLLOUT}.val_kwargs.n": evaluation.samples,
        f"{ROLLOUT}.val_kwargs.do_sample": several,
        f"{ROLLOUT}.val_kwargs.temperature": evaluation.temperature if several else 0,
        f"{ROLLOUT}.val_kwargs.top_p": 1.0,
        f"{ROLLOUT}.val_kwargs.top_k": -1,
        f"{MODEL}.custom_chat_template": template,
    }


def _model(experiment: Experiment) -> dict[str, Any]:
    model, lora = experiment.model, experiment.model.lora
    kept = _DTYPES[model.master_dtype]
    chosen: dict[str, Any] = {
        f"{MODEL}.path": str(Path(model.path or "").absolute()),
        f"{MODEL}.trust_remote_code": False,
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.fsdp_config.model_dtype": kept,
        f"{ACTOR}.fsdp_config.dtype": model.dtype,
        f"{ACTOR}.fsdp_config.seed": experiment.seed,
        f"{ACTOR}.data_loader_seed": experiment.seed,
        f"{ACTOR}.fsdp_config.qat.enable": False,  # its own rounding, of adapters too
        f"{MODEL}.lora_rank": lora.rank if lora else 0,
    }
    for part in (ACTOR, REF):  # named, since what is not is computed in bfloat16
        widths = {"param_dtype": _DTYPES[model.dtype], "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        chosen[f"+{part}.fsdp_config.mixed_precision"] = widths
    if lora is None:
        return chosen
    alone = len(lora.target_modules) == 1 and lora.target_modules[0] == "all-linear"
    chosen |= {
        f"{MODEL}.lora_alpha": round(lora_alpha(lora.rank, lora.alpha, rslora=lora.rslora)),
        f"{MODEL}.target_modules": "all-linear" if alone else list(lora.target_modules),
        # adapters that are sent alone leave the rollout with a base that nothing was done to
        f"{MODEL}.lora.merge": experiment.injection is not None or experiment.noise is not None,
    }
    return chosen | ({f"+{MODEL}.target_parameters": list(lora.target_parameters)} if lora.target_parameters else {})


def _batches(recipe: Training, devices: int) -> dict[str, Any]:
    micro = micro_batch(recipe, devices)
    return {
        f"{ACTOR}.use_dynamic_bsz": False,
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": micro,
        f"{REF}.log_prob_micro_batch_size_per_gpu": micro,
    }


def _data(files: Files) -> dict[str, Any]:
    return {
        "data.train_files": str(files.train),
        "data.val_files": str(files.validation),
        "data.shuffle": True,
        "data.truncation": "error",
        "data.filter_overlong_prompts": False,  # too long ones were refused when the file was written
        "data.validation_shuffle": False,
    }


def _reward(recipe: Training) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "reward.custom_reward_function.path": "pkg://fp4rl.engines.verl.reward",
        "reward.custom_reward_function.name": "compute_score",
        "reward.reward_manager.name": "dapo",
        f"+{OVERLONG}.enable": recipe.overlong is not None,
    }
    if recipe.overlong is None:
        return chosen
    buffer = {"len": recipe.overlong, "penalty_factor": recipe.overlong_buffer.penalty_factor, "log": True}
    longest = {"+reward.reward_kwargs.max_resp_len": recipe.max_response_length}
    return chosen | {f"+{OVERLONG}.{key}": value for key, value in buffer.items()} | longest


def _correction(experiment: Experiment) -> dict[str, Any]:
    correction, noise = experiment.training.rollout_correction, experiment.noise
    high = correction.threshold
    off = correction.rollout_is == "none"
    return {
        f"{CORRECTION}.rollout_is": None if off else correction.rollout_is,
        # two bounds: what is outside counts for nothing; one: what is above is cut to it
        f"{CORRECTION}.rollout_is_threshold": f"{1 / high!r}_{high!r}" if correction.mode == "mask" else high,
        f"{CORRECTION}.rollout_rs": None,
        f"{CORRECTION}.bypass_mode": noise is not None and noise.logprobs == "noisy",
        f"{CORRECTION}.loss_type": "ppo_clip",
    }


def _trainer(run: PlannedRun, devices: int, files: Files) -> dict[str, Any]:
    steps = run.experiment.training.steps
    return {
        "trainer.project_name": run.suite,
        "trainer.experiment_name": run.run_id,
        "trainer.logger": ["console", "tensorboard"],
        "trainer.default_local_dir": str(files.run),
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": devices,
        "trainer.total_epochs": steps,  # an upper bound: total_training_steps ends the run, dynamic sampling or not
        "trainer.save_freq": run.experiment.training.save_freq or steps,  # the last step is always kept
        "trainer.test_freq": run.experiment.evaluation.test_freq or steps,  # the first and the last are always judged
        "trainer.val_before_train": True,
        f"{ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    }


def _plug_in(files: Files) -> dict[str, Any]:
    return dict(word.split("=", 1) for word in settings.overrides(files.spec))
