"""Warnings about descriptions, before anything runs: for `plan`, a run's log and the report."""

from collections.abc import Iterator, Mapping

from fp4rl.lab.serving import changed, of_profiles, packed_otherwise
from fp4rl.noise.schedule import values_missed
from fp4rl.spec.algorithms import ALGORITHMS, Algorithm
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.idle import idle, is_set, value_at
from fp4rl.spec.words import agreeing, counted

_PLAIN = Algorithm("")  # the clipping of PPO


def spec_warnings(arms: Mapping[str, Experiment]) -> list[str]:
    """Return a line for each warning, once for all arms that share it; a setting that acts in some arm gives none."""
    arms_by_line: dict[str, list[str]] = {}
    for arm, experiment in arms.items():
        for line in (*experiment.warnings(), *_deployment(experiment), *_loss(experiment), *_noise(experiment)):
            arms_by_line.setdefault(line, []).append(arm)
    for line, names in _idle(arms):
        arms_by_line.setdefault(line, []).extend(names)
    named = {line: list(dict.fromkeys(names)) for line, names in arms_by_line.items()}
    return [line if len(names) == len(arms) else f"{line} (arm {', '.join(names)})" for line, names in named.items()]


def _idle(arms: Mapping[str, Experiment]) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys that cannot act in any arm that sets them, with the reason."""
    by_arm = {arm: idle(experiment) for arm, experiment in arms.items()}
    for key in dict.fromkeys(key for keys in by_arm.values() for key in keys):
        setting = [arm for arm, experiment in arms.items() if is_set(experiment, key)]
        if all(key in by_arm[arm] for arm in setting):
            value = value_at(arms[setting[0]], key)
            shown_value = f" {str(value).lower()}" if isinstance(value, str | int | float) else ""
            yield f"{key}{shown_value} cannot act: {by_arm[setting[0]][key]}", setting


def _noise(experiment: Experiment) -> Iterator[str]:
    noise, steps = experiment.noise, experiment.training.steps
    if noise is not None and noise.control != "sigma_zero" and (missed := values_missed(noise.schedule, steps)):
        values = ", ".join(f"{value:.4g}" for value in missed)
        few = f"{counted(steps, 'step')} {agreeing(steps, 'is', 'are')} too few"
        yield f"noise: {few} for its schedule, sigma never reaches {values}"


def _deployment(experiment: Experiment) -> Iterator[str]:
    """Yield what the deployment serves otherwise, and what acts in training but not under the profile `deployment`."""
    injection = experiment.injection
    if (line := changed(injection)) is not None:
        yield line
    for name, imitated in of_profiles(experiment.evaluation).items():
        if (line := changed(imitated)) is not None:
            yield f"evaluation profile {name}: {line}"
    if experiment.model.path is not None:  # the embedded model is for trying things out, not for packing
        rounded = (injection, *of_profiles(experiment.evaluation).values())
        if line := packed_otherwise(rounded, experiment.model.dtype):
            yield f"{line}: give model.dtype and injection.dtype one value"
    if injection is None or "deployment" not in experiment.evaluation.profiles:
        return
    backward = {"grad_input", "grad_weight"}
    if not any(error.forward for error in injection.errors):
        backward.add("errors")
    left = injection.points - injection.acts_in("evaluation") - backward
    for point in sorted(left):
        yield (
            f"the profile deployment leaves the injection's {point} out, so it is not what is trained for: "
            f"injection.apply_during.{point} does not name evaluation"
        )


def _loss(experiment: Experiment) -> Iterator[str]:
    """Yield settings of the loss that have hardly any effect."""
    recipe, noise = experiment.training, experiment.noise
    noisy = noise is not None and noise.logprobs == "noisy"
    own, usual = ((a.clipping, a.clip_ratio_low, a.clip_ratio_high) for a in (ALGORITHMS[recipe.algorithm], _PLAIN))
    if recipe.updates_per_step == 1 and not noisy and own != usual:
        yield (
            f"one update is made from each batch, so that the ratio is 1 and the clipping of {recipe.algorithm} never "
            "acts: a training.mini_batch_size below train_batch_size makes more"
        )
    if recipe.kl and recipe.kl_loss_type == "k1":
        yield "kl_loss_type k1: the gradient of this loss is zero on average; take low_var_kl or k2"
    of_answers = ALGORITHMS[recipe.algorithm].ratio_level == "sequence"
    if of_answers and (recipe.clip_ratio_high or 0.0) > 0.05 and recipe.updates_per_step > 1:
        yield (
            f"clip_ratio_high {recipe.clip_ratio_high} on a sequence ratio hardly ever acts; "
            "GSPO's own bounds are 3e-4 and 4e-4"
        )
