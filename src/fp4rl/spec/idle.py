"""Find settings of a description that cannot act there: one table of rules, for `plan`, logs and reports."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import FORMATS, Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.modes import MODES, PHASES
from fp4rl.spec.points import FORMAT_POINTS, ApplyDuring
from fp4rl.spec.targets import Targets
from fp4rl.spec.training import Training


@dataclass(frozen=True)
class Rule:
    """`keys` cannot act in experiments for which `holds` is true; `why` says so in words."""

    keys: tuple[str, ...]
    why: str
    holds: Callable[[Experiment], bool]


def idle(experiment: Experiment) -> dict[str, str]:
    """Return, by key, why its value, which is not the default, cannot act here."""
    reasons: dict[str, str] = {}
    for rule in RULES:
        if rule.holds(experiment):
            reasons |= {key: rule.why for key in rule.keys if is_set(experiment, key) and key not in reasons}
    return reasons | (dict(_idle_phases(experiment.injection)) if experiment.injection is not None else {})


def is_set(experiment: Experiment, key: str) -> bool:
    """Tell whether a key has another value than its default."""
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


def _training(name: str) -> Callable[..., tuple[str, ...]]:
    return lambda *keys: tuple(f"{name}.{key}" for key in keys)


_of_training = _training("training")
_REWARDED = _of_training(
    *("adv_estimator", "norm_adv_by_std", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
    *("reward", "kl_loss_coef"),
    *("kl_loss_type", "reference_precision", "overlong_buffer", "filter_groups", "rollout_correction"),
)


def _on_policy(experiment: Experiment) -> bool:
    """Whether the ratio is 1 in every update: one is made from a batch, and the sampler's own weights are scored."""
    noisy = experiment.noise is not None and experiment.noise.logprobs == "noisy"
    return experiment.training.updates_per_step == 1 and not noisy


def _distils_only(recipe: Training) -> bool:
    return recipe.distillation is not None and recipe.distillation.alone


def _injects(experiment: Experiment) -> bool:
    return experiment.injection is not None and not experiment.injection.is_nothing


def _every_format(injection: Injection) -> list[Format]:
    formats = [getattr(injection, point) for point in FORMAT_POINTS]
    formats += [getattr(row, point) for row in injection.by_pattern for point in ("weight", "input", "output")]
    return [fmt for fmt in formats if isinstance(fmt, Format)]


def _of_injection(holds: Callable[[Injection], bool]) -> Callable[[Experiment], bool]:
    return lambda experiment: experiment.injection is not None and holds(experiment.injection)


def _follows_no_preset(injection: Injection) -> bool:
    return not any(fmt.scale == "e8m0" and fmt.rounding != "stochastic" for fmt in _every_format(injection))


def _draws_nothing(injection: Injection) -> bool:
    return not injection.errors and all(fmt.rounding != "stochastic" for fmt in _every_format(injection))


def _evaluated_alone(experiment: Experiment) -> bool:
    """An injection of the evaluation phase alone, in a run that no profile judges under it."""
    injection, judged = experiment.injection, experiment.evaluation
    if injection is None or injection.is_nothing:
        return False
    phases = {phase for phase in PHASES if injection.acts_in(phase)}
    own = [name for name in judged.all_profiles if name == "deployment" or "=" in name]
    return phases <= {"evaluation"} and not own


def _names_formats(experiment: Experiment) -> bool:
    return any(name in MODES or name in FORMATS for name in experiment.evaluation.all_profiles)


def _rolls_back(experiment: Experiment) -> bool:
    health = experiment.health
    return "rollback" in (health.policy, *health.policies.values(), *(rule.action for rule in health.rules))


def _embedded(experiment: Experiment) -> bool:
    return experiment.model.embedded is not None


RULES: tuple[Rule, ...] = (
    Rule(_REWARDED, "training.distillation.alone leaves the rewards out", lambda e: _distils_only(e.training)),
    Rule(
        _of_training("kl_loss_type", "reference_precision"),
        "training.kl_loss_coef is 0, so there is no KL and no reference",
        lambda e: not e.training.kl,
    ),
    Rule(_of_training("reference_precision"), "nothing is injected", lambda e: not _injects(e)),
    Rule(
        _of_training("norm_adv_by_std"),
        "only training.adv_estimator grpo divides by the spread of a group",
        lambda e: e.training.adv_estimator != "grpo",
    ),
    Rule(
        _of_training("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
        "one update is made from each batch, so that the ratio is always 1",
        _on_policy,
    ),
    Rule(
        _of_training("overlong_buffer.len", "overlong_buffer.penalty_factor"),
        "training.overlong_buffer.enable is false, or left to an algorithm without it",
        lambda e: e.training.overlong is None,
    ),
    Rule(
        _of_training("filter_groups.metric", "filter_groups.max_num_gen_batches"),
        "training.filter_groups.enable is false, or left to an algorithm without it",
        lambda e: not e.training.filters,
    ),
    Rule(
        _of_training("rollout_correction.mode", "rollout_correction.threshold"),
        "training.rollout_correction.rollout_is is none",
        lambda e: e.training.rollout_correction.rollout_is == "none",
    ),
    Rule(
        _of_training("distillation"),
        "the live teacher is the student itself where nothing is injected",
        lambda e: not _injects(e) and e.training.distillation is not None and e.training.distillation.teacher == "live",
    ),
    Rule(
        ("model.embedded.warm_up_lr", "model.embedded.warm_up_batch_size", "model.embedded.warm_up_rise"),
        "model.embedded.warm_up_steps is 0",
        lambda e: e.model.embedded is not None and e.model.embedded.warm_up_steps == 0,
    ),
    Rule(("injection",), "it names no format and no error", lambda e: e.injection is not None and not _injects(e)),
    Rule(
        ("injection",),
        "it acts in evaluations alone, and none of evaluation.profiles is deployment",
        _evaluated_alone,
    ),
    Rule(("injection.preset",), "no format here has a scale that is a power of two", _of_injection(_follows_no_preset)),
    Rule(("injection.seed",), "nothing is drawn: no stochastic format, no error", _of_injection(_draws_nothing)),
    Rule(
        ("injection.fused_groups",),
        "every site has the same formats",
        _of_injection(lambda i: not i.by_pattern and i.targets == Targets()),
    ),
    Rule(
        ("noise.targets.final_norm", "noise.targets.qk_norms", "noise.targets.moe"),
        "noise.targets.kinds holds no norm",
        lambda e: e.noise is not None and "norm" not in e.noise.targets.kinds,
    ),
    Rule(("noise.targets.qk_norms",), "the embedded model has no norms of queries and keys", _embedded),
    Rule(("noise.targets.moe",), "the embedded model has no experts", _embedded),
    Rule(
        ("evaluation.temperature",),
        "evaluation.samples is 1, which is greedy",
        lambda e: e.evaluation.samples == 1,
    ),
    Rule(
        ("evaluation.preset",),
        "no profile is named by a mode or a format; deployment follows injection.preset",
        lambda e: not _names_formats(e),
    ),
    Rule(
        ("health.rollback_lr", "health.max_rollbacks"),
        "no policy of health is rollback",
        lambda e: not _rolls_back(e),
    ),
)


def _idle_phases(injection: Injection) -> Iterator[tuple[str, str]]:
    """Phases of a point that the injection does not have. A bare list, which stands for all points, names none."""
    during = injection.apply_during
    if len({getattr(during, point) for point in ApplyDuring.model_fields}) == 1:
        return
    points = injection.points
    for point, field in ApplyDuring.model_fields.items():
        if point not in points and getattr(during, point) != field.default:
            yield f"injection.apply_during.{point}", f"the injection has no {point}"
