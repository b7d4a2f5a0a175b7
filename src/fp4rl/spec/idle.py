"""Settings of a description that cannot act in it, for `plan`, logs and reports; one rule is one `if`."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import FORMATS
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, MODES, PHASES, ApplyDuring, Smooth
from fp4rl.spec.targets import Targets

Rules = Iterator[tuple[str, tuple[str, ...]]]

_REWARDED = (
    *("adv_estimator", "norm_adv_by_std", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "reward", "rewards"),
    *("kl_loss_coef", "kl_loss_type", "reference_precision", "overlong_buffer", "filter_groups", "rollout_correction"),
)


def idle(experiment: Experiment) -> dict[str, str]:
    """Return key -> why its value cannot act here, for keys that are not at their default."""
    reasons: dict[str, str] = {}
    for why, keys in rules(experiment):
        reasons |= {key: why for key in keys if is_set(experiment, key) and key not in reasons}
    return reasons | (dict(_idle_phases(experiment.injection)) if experiment.injection is not None else {})


def is_set(experiment: Experiment, key: str) -> bool:
    """Return whether a key has another value than its default."""
    above, _, last = key.rpartition(".")
    parent = value_at(experiment, above) if above else experiment
    if not isinstance(parent, BaseModel):
        return False
    default = type(parent).model_fields[last].get_default(call_default_factory=True)
    return bool(getattr(parent, last) != default)


def value_at(experiment: Experiment, key: str) -> Any:
    """Return the value of a dotted key; None where something above it is None."""
    value: Any = experiment
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def rules(experiment: Experiment) -> Rules:
    """Yield (reason, keys) for everything that cannot act in an experiment, whether its keys are set or not."""
    yield from _of_training(experiment)
    if not experiment.training.save_freq:
        yield "training.save_freq is 0: no checkpoint stays", ("training.save_total_limit",)
    yield from _of_models(experiment)
    if experiment.injection is not None:
        yield from _of_injection(experiment.injection, experiment.evaluation.all_profiles)
    yield from _of_evaluation(experiment)
    if experiment.rollout.engine != "vllm":
        yield "rollout.engine is not vllm", _keys("rollout", "gpu_memory_utilization", "max_model_len")
    if experiment.rollout.server is not None:
        keys = _keys("rollout", "gpu_memory_utilization", "max_model_len")
        yield "the server was started with its own", keys


def _keys(above: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{above}.{name}" for name in names)


def _of_training(experiment: Experiment) -> Rules:
    recipe, distillation = experiment.training, experiment.training.distillation
    injects = experiment.injection is not None and not experiment.injection.is_nothing
    if distillation is not None and distillation.alone:
        yield "training.distillation.alone leaves the rewards out", _keys("training", *_REWARDED)
    if not recipe.kl:
        keys = _keys("training", "kl_loss_type", "reference_precision")
        yield "training.kl_loss_coef is 0, so there is no KL and no reference", keys
    if not injects:
        yield "nothing is injected", ("training.reference_precision",)
    if recipe.adv_estimator != "grpo":
        keys = ("training.norm_adv_by_std",)
        yield "only training.adv_estimator grpo divides by the spread of a group", keys
    if recipe.updates_per_step == 1 and (experiment.noise is None or experiment.noise.logprobs == "clean"):
        keys = _keys("training", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
        yield "one update is made from each batch, so that the ratio is always 1", keys
    if recipe.overlong is None:
        keys = _keys("training.overlong_buffer", "len", "penalty_factor")
        yield "training.overlong_buffer.enable is false, or left to an algorithm without it", keys
    if not recipe.filters:
        keys = _keys("training.filter_groups", "metric", "max_num_gen_batches")
        yield "training.filter_groups.enable is false, or left to an algorithm without it", keys
    if recipe.rollout_correction.rollout_is == "none":
        keys = _keys("training.rollout_correction", "mode", "threshold")
        yield "training.rollout_correction.rollout_is is none", keys
    if not injects and distillation is not None and distillation.teacher == "live":
        yield "the live teacher is the student itself where nothing is injected", ("training.distillation",)


def _of_models(experiment: Experiment) -> Rules:
    embedded, noise = experiment.model.embedded, experiment.noise
    if embedded is not None and embedded.warm_up_steps == 0:
        keys = _keys("model.embedded", "warm_up_lr", "warm_up_batch_size", "warm_up_rise")
        yield "model.embedded.warm_up_steps is 0", keys
    if noise is not None and "norm" not in noise.targets.kinds:
        yield "noise.targets.kinds holds no norm", _keys("noise.targets", "final_norm", "qk_norms", "moe")
    if embedded is not None:
        yield "the embedded model has no norms of queries and keys", ("noise.targets.qk_norms",)
        yield "the embedded model has no experts", ("noise.targets.moe",)


def _of_injection(injection: Injection, profiles: tuple[str, ...]) -> Rules:
    if injection.is_nothing:
        yield "it names no format and no error", ("injection",)
    elsewhere = any(injection.acts_in(phase) for phase in PHASES if phase != "evaluation")
    if not elsewhere and not any(name == "deployment" or "=" in name for name in profiles):
        yield "it acts in evaluations alone, and none of evaluation.profiles is deployment", ("injection",)
    formats = [fmt for p in FORMAT_POINTS for fmt in (*injection.formats_at(p), *injection.formats_before(p))]
    if not any(fmt.scale == "e8m0" and fmt.rounding != "stochastic" for fmt in formats):
        yield "it rules power-of-two scales, and no format here has one", ("injection.deployment",)
    if not injection.errors and all(fmt.rounding != "stochastic" for fmt in formats):
        yield "nothing is drawn: no stochastic format, no error", ("injection.seed",)
    if injection.straight_through != "smooth":
        yield "injection.straight_through is not smooth", _keys("injection.smooth", *Smooth.model_fields)
    if not injection.by_pattern and injection.targets == Targets():
        yield "every site has the same formats", ("injection.fused_groups",)
    for point, own in injection.schedule.points.items() if injection.schedule is not None else ():
        if own.stage(0) == "after":
            yield "from_step is 0, and there is no step before it", (f"injection.schedule.{point}",)


def _of_evaluation(experiment: Experiment) -> Rules:
    evaluation, health = experiment.evaluation, experiment.health
    if evaluation.samples == 1:
        yield "evaluation.samples is 1, which is greedy", _keys("evaluation", "temperature", "seed")
    if not any(name in MODES or name in FORMATS for name in evaluation.all_profiles):
        keys = ("evaluation.deployment",)
        yield "no profile is named by a mode or a format; the profile deployment follows injection.deployment", keys
    if "rollback" not in (health.policy, *health.policies.values(), *(rule.action for rule in health.rules)):
        yield "no policy of health is rollback", _keys("health", "rollback_lr", "max_rollbacks")


def _idle_phases(injection: Injection) -> Iterator[tuple[str, str]]:
    """Yield phases that are named for a point without a format. A bare list stands for all points and names none."""
    during = injection.apply_during
    if len({getattr(during, point) for point in ApplyDuring.model_fields}) == 1:
        return
    points = injection.points
    for point, field in ApplyDuring.model_fields.items():
        if point not in points and getattr(during, point) != field.default:
            yield f"injection.apply_during.{point}", f"the injection has no {point}"
