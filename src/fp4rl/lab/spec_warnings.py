"""Warnings about descriptions, before anything runs: for `plan`, a run's log and the report."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from fp4rl.lab.serving import changed, of_profiles, packed_otherwise
from fp4rl.noise.schedule import values_missed
from fp4rl.spec.algorithms import ALGORITHMS, Algorithm
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import Format
from fp4rl.spec.idle import idle, is_set, value_at
from fp4rl.spec.words import agreeing, counted

_PLAIN = Algorithm("")  # the clipping of PPO


def spec_warnings(arms: Mapping[str, Experiment]) -> list[str]:
    """Return a line for each warning, once for all arms that share it; a setting that acts in some arm gives none."""
    every = [*(pair for source in SOURCES.values() for pair in by_line(source, arms)), *idle_settings(arms)]
    return [line if len(names) == len(arms) else f"{line} (arm {', '.join(names)})" for line, names in every]


def by_line(source: "Source", arms: Mapping[str, Experiment]) -> list[tuple[str, list[str]]]:
    """Return the lines of one source of warnings, each with the arms that share it."""
    named: dict[str, list[str]] = {}
    for arm, experiment in arms.items():
        for line in dict.fromkeys(source(experiment)):
            named.setdefault(line, []).append(arm)
    return list(named.items())


def idle_settings(arms: Mapping[str, Experiment]) -> Iterator[tuple[str, list[str]]]:
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


def _precision(experiment: Experiment) -> Iterator[str]:
    """Yield the formats that a precision that changes reaches too late, or never."""
    injection, steps = experiment.injection, experiment.training.steps
    if injection is None or injection.schedule is None:
        return
    for point, own in injection.schedule.points.items():
        last = len(own.stages(steps).get("after", ()))
        if last < steps / 5:
            formats = ", ".join(dict.fromkeys(fmt.name for fmt in injection.formats_at(point)))
            trained = f"only for {last} of {counted(steps, 'step')}" if last else f"in none of {counted(steps, 'step')}"
            yield f"injection.schedule.{point}: {formats}, which is deployed and evaluated, is trained with {trained}"


def _served(experiment: Experiment) -> Iterator[str]:
    """Yield what the deployment serves otherwise."""
    if (line := changed(experiment.injection)) is not None:
        yield line
    for name, imitated in of_profiles(experiment.evaluation).items():
        if (line := changed(imitated)) is not None:
            yield f"evaluation profile {name}: {line}"
    yield from _turned_apart(experiment)


def _turned_apart(experiment: Experiment) -> Iterator[str]:
    """Yield a line where weights and inputs of one product are rounded in two bases, which no kernel multiplies."""
    injection = experiment.injection
    for row in (injection, *injection.by_pattern) if injection is not None else ():
        weight, given = getattr(row, "weight", None), getattr(row, "input", None)
        if isinstance(weight, Format) and isinstance(given, Format) and weight.rotation != given.rotation:
            ours, theirs = weight.rotation or "none", given.rotation or "none"
            yield (
                f"injection.weight has the rotation {ours} and injection.input {theirs}: no kernel multiplies the "
                "codes of two bases; give both one rotation"
            )


def _packed(experiment: Experiment) -> Iterator[str]:
    """Yield a line where a packer would round other numbers than are rounded here."""
    if experiment.model.path is not None:  # the embedded model is for trying things out, not for packing
        rounded = (experiment.injection, *of_profiles(experiment.evaluation).values())
        if line := packed_otherwise(rounded, experiment.model.dtype):
            yield f"{line}: give model.dtype and injection.dtype one value"


def _left_out(experiment: Experiment) -> Iterator[str]:
    """Yield what acts in training but not under the profile `deployment`."""
    injection = experiment.injection
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


Source = Callable[[Experiment], Iterator[str]]
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "recipe": lambda experiment: experiment.training.warnings(),
        "updates": Experiment.out_of_reach,
        "evaluations": Experiment.uneven_evaluations,
        "batch": Experiment.batch_dependent,
        "served": _served,
        "packer": _packed,
        "judged": _left_out,
        "loss": _loss,
        "schedule": _noise,
        "precision": _precision,
    }
)
"""Name -> what it warns of in one experiment; `fp4rl preflight` tells which trap each is about."""
