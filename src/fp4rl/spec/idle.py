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


def _keys(above: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{above}.{name}" for name in names)


_REWARDED = (
    *("adv_estimator", "norm_adv_by_std", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "reward"),
    *("kl_loss_coef", "kl_loss_type", "reference_precision", "overlong_buffer", "filter_groups", "rollout_correction"),
)


def _on_policy(experiment: Experiment) -> bool:
    """Whether the ratio is 1 in every update: one is made from a batch, and the sampler's own weights are scored."""
    noisy = experiment.noise is not None and experiment.noise.logprobs == "noisy"
    return experiment.training.updates_per_step == 1 and not noisy


def _injects(experiment: Experiment) -> bool:
    return experiment.injection is not None and not experiment.injection.is_nothing


def _of_injection(holds: Callable[[Injection, list[Format]], bool]) -> Callable[[Experiment], bool]:
    """A condition on an injection and all its formats, gradients' and exceptions' among them."""

    def of_experiment(experiment: Experiment) -> bool:
        injection = experiment.injection
        if injection is None:
            return False
        rows = (injection, *injection.by_pattern)
        formats = [getattr(row, point, None) for row in rows for point in FORMAT_POINTS]
        return holds(injection, [fmt for fmt in formats if isinstance(fmt, Format)])

    return of_experiment


def _evaluated_alone(experiment: Experiment) -> bool:
    """An injection of the evaluation phase alone, in a run that no profile evaluates under it."""
    injection = experiment.injection
    if injection is None or injection.is_nothing:
        return False
    own = any(name == "deployment" or "=" in name for name in experiment.evaluation.all_profiles)
    return not own and not any(injection.acts_in(phase) for phase in PHASES if phase != "evaluation")


def _rolls_back(experiment: Experiment) -> bool:
    health = experiment.health
    return "rollback" in (health.policy, *health.policies.values(), *(rule.action for rule in health.rules))


RULES: tuple[Rule, ...] = (
    Rule(
        _keys("training", *_REWARDED),
        "training.distillation.alone leaves the rewards out",
        lambda e: e.training.distillation is not None and e.training.distillation.alone,
    ),
    Rule(
        _keys("training", "kl_loss_type", "reference_precision"),
        "training.kl_loss_coef is 0, so there is no KL and no reference",
        lambda e: not e.training.kl,
    ),
    Rule(("training.reference_precision",), "nothing is injected", lambda e: not _injects(e)),
    Rule(
        ("training.norm_adv_by_std",),
        "only training.adv_estimator grpo divides by the spread of a group",
        lambda e: e.training.adv_estimator != "grpo",
    ),
    Rule(
        _keys("training", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
        "one update is made from each batch, so that the ratio is always 1",
        _on_policy,
    ),
    Rule(
        _keys("training.overlong_buffer", "len", "penalty_factor"),
        "training.overlong_buffer.enable is false, or left to an algorithm without it",
        lambda e: e.training.overlong is None,
    ),
    Rule(
        _keys("training.filter_groups", "metric", "max_num_gen_batches"),
        "training.filter_groups.enable is false, or left to an algorithm without it",
        lambda e: not e.training.filters,
    ),
    Rule(
        _keys("training.rollout_correction", "mode", "threshold"),
        "training.rollout_correction.rollout_is is none",
        lambda e: e.training.rollout_correction.rollout_is == "none",
    ),
    Rule(
        ("training.distillation",),
        "the live teacher is the student itself where nothing is injected",
        lambda e: not _injects(e) and e.training.distillation is not None and e.training.distillation.teacher == "live",
    ),
    Rule(
        _keys("model.embedded", "warm_up_lr", "warm_up_batch_size", "warm_up_rise"),
        "model.embedded.warm_up_steps is 0",
        lambda e: e.model.embedded is not None and e.model.embedded.warm_up_steps == 0,
    ),
    Rule(("injection",), "it names no format and no error", lambda e: e.injection is not None and not _injects(e)),
    Rule(
        ("injection",),
        "it acts in evaluations alone, and none of evaluation.profiles is deployment",
        _evaluated_alone,
    ),
    Rule(
        ("injection.preset",),
        "no format here has a scale that is a power of two",
        _of_injection(lambda _, formats: not any(f.scale == "e8m0" and f.rounding != "stochastic" for f in formats)),
    ),
    Rule(
        ("injection.seed",),
        "nothing is drawn: no stochastic format, no error",
        _of_injection(lambda i, formats: not i.errors and all(f.rounding != "stochastic" for f in formats)),
    ),
    Rule(
        ("injection.fused_groups",),
        "every site has the same formats",
        _of_injection(lambda i, _: not i.by_pattern and i.targets == Targets()),
    ),
    Rule(
        _keys("noise.targets", "final_norm", "qk_norms", "moe"),
        "noise.targets.kinds holds no norm",
        lambda e: e.noise is not None and "norm" not in e.noise.targets.kinds,
    ),
    Rule(
        ("noise.targets.qk_norms",),
        "the embedded model has no norms of queries and keys",
        lambda e: e.model.embedded is not None,
    ),
    Rule(("noise.targets.moe",), "the embedded model has no experts", lambda e: e.model.embedded is not None),
    Rule(
        ("evaluation.temperature",),
        "evaluation.samples is 1, which is greedy",
        lambda e: e.evaluation.samples == 1,
    ),
    Rule(
        ("evaluation.preset",),
        "no profile is named by a mode or a format; deployment follows injection.preset",
        lambda e: not any(name in MODES or name in FORMATS for name in e.evaluation.all_profiles),
    ),
    Rule(
        _keys("health", "rollback_lr", "max_rollbacks"), "no policy of health is rollback", lambda e: not _rolls_back(e)
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
