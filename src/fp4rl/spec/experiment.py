"""One experiment, and a suite of them: arms that differ from a common base by declared factors."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.fitting import with_fitting_numbers
from fp4rl.spec.frozen import Spec, later_key
from fp4rl.spec.health import Health
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Model
from fp4rl.spec.modes import MODES
from fp4rl.spec.noise import Noise
from fp4rl.spec.points import LINEAR_POINTS
from fp4rl.spec.shared_scales import batch_note, shared_scales
from fp4rl.spec.task_registry import TASKS, AnyTask
from fp4rl.spec.training import Training
from fp4rl.spec.words import counted

_USUAL_WEIGHT = 0.02  # the size of most weights of a language model


class Experiment(Spec):
    """Everything that decides a result: what is not in here changes no number."""

    model: Model = Model()
    task: AnyTask = TASKS["arithmetic"]()
    training: Training = Training()
    injection: Injection | None = None
    noise: Noise | None = None
    evaluation: Evaluation = Evaluation()
    health: Health = Health()
    sampler: str = later_key("transformers", description="what generates the answers of rollouts and evaluations")
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _numbers_that_fit_the_model(cls, value: Any) -> Any:
        return with_fitting_numbers(value) if isinstance(value, dict) else value

    @field_validator("injection", "noise", mode="before")
    @classmethod
    def _none_is_a_word(cls, value: Any) -> Any:
        return None if value == "none" else value

    @model_validator(mode="before")
    @classmethod
    def _the_bf16_control_rounds_nothing(cls, value: Any) -> Any:
        """`noise.control: bf16` is the same noise on the unquantized model."""
        noise = value.get("noise") if isinstance(value, dict) else None
        control = noise.get("control") if isinstance(noise, dict) else getattr(noise, "control", None)
        return {**value, "injection": None} if control == "bf16" else value

    @model_validator(mode="after")
    def _the_head_can_be_rounded(self) -> "Experiment":
        """Refuse `targets.opt_in: [lm_head]` where it cannot act."""
        embedded, injection = self.model.embedded, self.injection
        if injection is None or "lm_head" not in injection.targets.opt_in:
            return self
        if embedded and embedded.tie_word_embeddings:
            raise ValueError(
                "injection.targets.opt_in: the embedded model's lm_head shares its weight with the embedding, which is "
                "not rounded; write model.embedded.tie_word_embeddings: false, or drop lm_head"
            )
        if any("training" in getattr(injection.apply_during, p) for p in LINEAR_POINTS if getattr(injection, p)):
            raise ValueError(
                "injection.targets.opt_in: the training forward reads lm_head's weight without calling the layer, so "
                "rounding would not reach it there; write apply_during: [rollout, evaluation], or drop lm_head"
            )
        return self

    @model_validator(mode="after")
    def _sampler_and_trainer_can_round_alike(self) -> "Experiment":
        shared = shared_scales(self.injection, "rollout", "training")
        if shared:
            raise ValueError(
                f"injection: {', '.join(shared)}: all tokens of a call share a scale, so that a token is rounded "
                "differently in a batch of another size: sampler and trainer would be two policies. Keep such formats "
                "to weights (nvfp4_w4a16) or to evaluation, or take MXFP4 (w4a4)"
            )
        return self

    def warnings(self) -> list[str]:
        """Return what is allowed and hardly ever meant, one line each."""
        steps, every, lines = self.training.steps, self.evaluation.test_freq, self.training.warnings()
        lines += self._out_of_reach()
        if every > steps:
            lines.append(
                f"evaluation.test_freq {every} is more than {counted(steps, 'step')}: nothing is judged on the way"
            )
        elif every and steps % every:
            lines.append(
                f"evaluation.test_freq {every} does not divide {counted(steps, 'step')}: the last part, from step "
                f"{steps // every * every} to {steps}, is shorter than the others"
            )
        for profile in self.evaluation.profiles:
            if note := batch_note(self._measured_under(profile), "evaluation"):
                lines.append(f"evaluation profile {profile}: {note} (evaluation.batch_size)")
        return lines

    def _measured_under(self, profile: str) -> Injection | None:
        """Return the injection that a profile names, as far as this description alone tells."""
        if profile == "deployment":
            return self.injection
        return self.evaluation.injections.get(profile) or (Injection.named(profile) if profile in MODES else None)

    def _out_of_reach(self) -> list[str]:
        """Warn of weights that the planned updates cannot change in the model's dtype; AdamW's are about `lr` each."""
        model, recipe = self.model, self.training
        updates = 1 if model.coarse_masters else recipe.steps * recipe.updates_per_step
        largest = recipe.lr * updates / model.smallest_change
        if model.dtype == "float32" or model.lora is not None or largest > _USUAL_WEIGHT:
            return []
        what, cure = f"{updates} updates of about training.lr {recipe.lr:g} together", "more steps or a larger lr"
        if model.coarse_masters:
            what, cure = f"updates of about training.lr {recipe.lr:g}", "model.master_dtype: float32"
        return [
            f"{what} are below half a step of {model.dtype} for every weight above "
            f"{largest:.1g}: hardly any weight will change; take {cure}"
        ]


class Comparison(Spec):
    """A question fixed before the runs: does `treatment` differ from `control`, or reach it?

    Both sides are `arm@profile`. `factors` are the keys in which the two arms may differ; any other difference refuses
    the comparison. `reaches` is a non-inferiority test with `margin` in accuracy points (0.01 is one point).
    """

    question: str = Field(description="in words, for the report")
    treatment: str = Field(description="arm@profile, such as w4a16@deployment")
    control: str = Field(description="arm@profile that it is held against")
    factors: tuple[str, ...] = Field(
        default=(), description="keys in which the two arms may differ; any other difference refuses the comparison"
    )
    test: Literal["differs", "reaches"] = Field(default="differs", description="reaches: is it worse by < margin?")
    margin: PositiveFloat | None = Field(
        default=None, description="of `reaches`, a share: 0.01 is one point of accuracy (--margin 1 on a command line)"
    )

    @model_validator(mode="after")
    def _a_margin_to_reach(self) -> "Comparison":
        if (self.test == "reaches") != (self.margin is not None):
            raise ValueError("`margin` belongs to `test: reaches`, which cannot be judged without one")
        return self


class Suite(Spec):
    """Arms x axes x seeds over one base. `arms` and `axes` hold overrides of `base`, by nested keys or dotted paths."""

    suite: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=150, description="names the folder under runs/"
    )
    base: dict[str, Any] = Field(
        default_factory=dict, description="what all arms share: the keys of an experiment, but `seed`"
    )
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="the name of each arm, and the keys in which it differs from the base"
    )
    axes: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="a key and its values: every arm is run with each of them"
    )
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1, description="every arm is run with each")
    comparisons: tuple[Comparison, ...] = Field(default=(), description="the questions, fixed before the runs")

    @model_validator(mode="after")
    def _names_fit(self) -> "Suite":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"a seed is named twice in {list(self.seeds)}")
        for name, content in (("base", self.base), *((f"arms.{arm}", content) for arm, content in self.arms.items())):
            if "seed" in content:
                raise ValueError(f"{name}.seed: a suite runs every arm with each of its own `seeds`; name them there")
        for key, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{key}: is empty; name at least one value, or drop the axis")
        if "seed" in self.axes:
            raise ValueError("axes.seed: the seeds of a suite stand in its own `seeds`")
        for arm in self.arms:
            if not arm or any(c in arm for c in "@/\\ "):
                raise ValueError(f"arm {arm!r}: a name has no '@', slash or space (arm@profile names a measurement)")
        return self
