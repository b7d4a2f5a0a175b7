"""One experiment, and a suite of them: arms that differ from a common base by declared factors."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fp4rl.spec.criteria import Criterion
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.frozen import NoneIsAWord, Spec, later_key
from fp4rl.spec.health import Health
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Model, embedded
from fp4rl.spec.noise import Noise
from fp4rl.spec.oscillation import without_codes
from fp4rl.spec.points import LINEAR_POINTS, MODES
from fp4rl.spec.rollout import TRANSFORMERS, RolloutEngine
from fp4rl.spec.shared_scales import batch_note, shared_scales
from fp4rl.spec.stages import Start
from fp4rl.spec.task_registry import TASKS, AnyTask
from fp4rl.spec.training import Training
from fp4rl.spec.transforms import unties
from fp4rl.spec.words import counted

_USUAL_WEIGHT = 0.02  # the size of most weights of a language model

# Defaults that depend on the model: what fits a small embedded model ruins a real one. Its learning rate was found by
# trying; the default of 1e-6 is that of the GRPO and DAPO papers, and adapters take about ten times the rate of whole
# weights.
_EMBEDDED: Mapping[str, Mapping[str, Any]] = {
    "s": {"lr": 4e-4, "max_response_length": 48},
    "m": {"lr": 1e-4, "max_response_length": 52},
    "l": {"lr": 5e-5, "max_response_length": 52},
}
_HARDER = {"m": 6, "l": 6}  # size -> difficulty of the arithmetic task
_ADAPTER = {"lr": 1e-5}


def _with_fitting_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the unchecked `content` of an experiment with defaults that fit its model: `training.lr`,
    `training.max_response_length`, the same length of answers in evaluations as in training, and `task.difficulty`."""
    model = _named(content.get("model") or {})
    if isinstance(model, str):
        model = embedded(model) or {"path": model}
    training, evaluation = _named(content.get("training", {})), _named(content.get("evaluation", {}))
    if not (isinstance(model, Mapping) and isinstance(training, Mapping) and isinstance(evaluation, Mapping)):
        return dict(content)  # validation reports what is wrong with it
    size = _size(model)
    fitting = _EMBEDDED[size] if size else _ADAPTER if model.get("lora") is not None else {}
    training = {**fitting, **training}
    longest = training.get("max_response_length", Training.model_fields["max_response_length"].default)
    fitted = {**content, "training": training, "evaluation": {"max_new_tokens": longest, **evaluation}}
    task = _named(content.get("task", {}))
    if size in _HARDER and isinstance(task, Mapping) and task.get("name", "arithmetic") == "arithmetic":
        fitted["task"] = {"name": "arithmetic", "difficulty": _HARDER[size], **task}
    return fitted


def _size(model: Mapping[str, Any]) -> str | None:
    """Return the size of an embedded model; None for a folder."""
    if model.get("path"):
        return None
    given = _named(model.get("embedded") or {})
    size = given.get("size", "s") if isinstance(given, Mapping) else "s"
    return size if isinstance(size, str) and size in _EMBEDDED else "s"


def _named(part: Any) -> Any:
    return part.model_dump(exclude_unset=True) if isinstance(part, BaseModel) else part


class Experiment(Spec):
    """Everything that decides a result: what is not in here changes no number."""

    model: Model = Model()
    start: Start | None = later_key(None)
    task: AnyTask = TASKS["arithmetic"]()
    training: Training = Training()
    injection: Annotated[Injection | None, NoneIsAWord] = None
    noise: Annotated[Noise | None, NoneIsAWord] = None
    evaluation: Evaluation = Evaluation()
    health: Health = Health()
    rollout: RolloutEngine = later_key(TRANSFORMERS)
    engine: Literal["trl", "verl"] = later_key(
        "trl", description="what trains: trl in `fp4rl run`, or verl, whose finished runs `fp4rl runs import` takes in"
    )
    processes: PositiveInt = later_key(1, description="processes that train the run together, each on a share")
    sharding: Literal["none", "fsdp2"] = later_key(
        "none", description="whether each process holds all weights and optimizer states (DDP), or its part of them"
    )
    seed: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _that_fits_itself(cls, value: Any) -> Any:
        """Fill in defaults that fit the model; `noise.control: bf16` takes the injection out."""
        if not isinstance(value, dict):
            return value
        noise = _named(value.get("noise"))
        unrounded = isinstance(noise, Mapping) and noise.get("control") == "bf16"
        return _with_fitting_numbers(value) | ({"injection": None} if unrounded else {})

    def _conflicts(self) -> Iterator[str]:
        tiny, injection = self.model.embedded, self.injection
        if injection is not None and "lm_head" in injection.targets.opt_in:
            if tiny and tiny.tie_word_embeddings and not unties(self.model.transforms):
                yield (
                    "injection.targets.opt_in: the embedded model's lm_head shares its weight with the embedding, "
                    "which is not rounded; write model.embedded.tie_word_embeddings: false, or drop lm_head"
                )
            if any("training" in getattr(injection.apply_during, p) for p in LINEAR_POINTS if getattr(injection, p)):
                yield (
                    "injection.targets.opt_in: the training forward reads lm_head's weight without calling the layer, "
                    "so rounding would not reach it there; write apply_during: [rollout, evaluation], or drop lm_head"
                )
        if shared := shared_scales(self.injection, "rollout", "training"):
            yield (
                f"injection: {', '.join(shared)}: all tokens of a call share a scale, so that the log-probability of a "
                "token depends on its batch-mates: sampler and trainer would be two policies. Give NVFP4 and FP8 "
                "`factor: per_token` (mode nvfp4_w4a4 does) or static; or take MXFP4 (w4a4), or keep such formats to "
                "weights (nvfp4_w4a16) or to evaluation"
            )

        if self.rollout.engine != "transformers" and self.processes > 1:
            yield f"rollout.engine {self.rollout.engine} gets its weights from one process; write processes: 1"
        yield from (f"training: {why}" for why in self.training.not_shared(self.processes))
        if self.sharding != "none" and self.processes == 1:
            yield f"sharding: {self.sharding} divides the weights over several processes; set processes"
        yield from self._wrong_choice()
        yield from self._not_followed()
        yield from self._not_watched()
        yield from self._not_clipped()
        if self.sharding != "none" and self.training.distillation is not None:
            yield "training.distillation needs the whole head outside the forward; write sharding: none"
        if self.sharding != "none" and injection is not None and injection.frozen_base == "packed":
            yield "injection.frozen_base: FSDP cannot shard packed weights; write copy, or sharding: none"

    def _not_watched(self) -> Iterator[str]:
        settings, ema = self.training.oscillation, self.training.ema
        rounds = ema is not None and ema.rounds
        key = "training.oscillation" if settings is not None else "training.ema.rounds"
        if settings is None and not rounds:
            return
        if self.model.lora is not None:
            yield f"{key}: adapters are trained, and have no codes of their own; leave it out"
        if self.sharding != "none":
            yield f"{key}: codes need whole weights; write sharding: none"
        if settings is not None:
            yield from (f"{key}: {why}" for why in settings.refused(self.injection))
        if rounds:
            yield from (f"training.ema.rounds: {why}" for why in without_codes(self.injection, "it"))
        if rounds and self.rollout.engine != "transformers":
            yield f"training.ema.rounds: {self.rollout.engine} rounds by itself; take rollout.engine transformers"
        if rounds and self.injection is not None and self.injection.schedule and self.injection.schedule.weight:
            yield "training.ema.rounds: levels are of one format; leave injection.schedule.weight out"
        if rounds and settings is not None and settings.freeze is not None:
            yield "training.oscillation.freeze and training.ema.rounds both decide on levels; take one of them"

    def _not_clipped(self) -> Iterator[str]:
        recipe, key = self.training, "training.learned_clipping"
        if recipe.learned_clipping is None:
            return
        yield from (f"{key}: {why}" for why in recipe.learned_clipping.refused(self.injection, recipe.oscillation))
        if self.model.lora is not None:
            yield f"{key}: adapters are trained, and the weights beside them stay as they are; leave it out"
        if self.model.coarse_masters:
            yield f"{key}: FP32 masters are clamped into the model; write model.master_dtype: float32"
        if self.sharding != "none":
            yield f"{key}: blocks need whole weights; write sharding: none"

    def _wrong_choice(self) -> Iterator[str]:
        recipe, judged = self.training, self.evaluation
        if self.sharding != "none" and (recipe.ema is not None or recipe.deployed == "best"):
            key = "ema" if recipe.ema is not None else "deployed"
            yield f"training.{key} keeps whole weights beside the model's; write sharding: none"
        if recipe.deployed == "best" and judged.split != "test":
            yield (
                "training.deployed: best chooses on the validation split, and what chose cannot judge; write "
                "evaluation.split: test"
            )
        if recipe.deployed == "best" and not 0 < judged.test_freq <= recipe.steps:
            yield (
                f"training.deployed: best chooses among each evaluation.test_freq steps, which is {judged.test_freq}; "
                f"write 1 to {recipe.steps}"
            )

    def _not_followed(self) -> Iterator[str]:
        if self.injection is None or self.injection.schedule is None:
            return
        followed = {"engine": (self.engine, "trl"), "rollout.engine": (self.rollout.engine, "transformers")}
        for key, (engine, cure) in followed.items():
            if engine != cure:
                yield f"injection.schedule: {key} {engine} does not follow a precision that changes; write {cure}"

    def warnings(self) -> Iterator[str]:
        """Yield a line for everything that is allowed but hardly ever meant."""
        yield from self.training.warnings()
        yield from self.out_of_reach()
        yield from self.uneven_evaluations()
        yield from self.batch_dependent()

    def uneven_evaluations(self) -> Iterator[str]:
        """Yield a line where evaluations on the way do not come to the last step."""
        steps, every = self.training.steps, self.evaluation.test_freq
        if every > steps:
            yield f"evaluation.test_freq {every} is more than {counted(steps, 'step')}: nothing is judged on the way"
        elif every and steps % every:
            yield (
                f"evaluation.test_freq {every} does not divide {counted(steps, 'step')}: the last part, from step "
                f"{steps // every * every} to {steps}, is shorter than the others"
            )

    def batch_dependent(self) -> Iterator[str]:
        """Yield a line for each profile whose tokens share a scale, as far as this description alone tells."""
        named = {"deployment": self.injection, **self.evaluation.injections}
        for profile in self.evaluation.profiles:
            injection = Injection.named(profile) if profile in MODES else named.get(profile)
            if note := batch_note(injection, "evaluation"):
                yield f"evaluation profile {profile}: {note} (evaluation.batch_size)"

    def out_of_reach(self) -> Iterator[str]:
        """Yield a line for weights that updates cannot change in the model's dtype; AdamW's are about `lr` each."""
        model, recipe = self.model, self.training
        updates = 1 if model.coarse_masters else recipe.steps * recipe.updates_per_step
        largest = recipe.lr * updates / model.smallest_change
        if model.dtype == "float32" or model.lora is not None or largest > _USUAL_WEIGHT:
            return
        what, cure = f"{updates} updates of about training.lr {recipe.lr:g} together", "more steps or a larger lr"
        if model.coarse_masters:
            what, cure = f"updates of about training.lr {recipe.lr:g}", "model.master_dtype: float32"
        yield (
            f"{what} are below half a step of {model.dtype} for every weight above "
            f"{largest:.1g}: hardly any weight will change; take {cure}"
        )


class Comparison(Spec):
    """A question fixed before the runs: does `treatment` differ from `control`, or reach it?

    Both sides are `arm@profile`. `factors` are the keys in which the two arms may differ; a comparison with any other
    difference is refused. `reaches` is a non-inferiority test with `margin` as a share (0.01 is one accuracy point).
    """

    question: str = Field(description="in words, for the report")
    treatment: str = Field(description="arm@profile, such as w4a16@deployment")
    control: str = Field(description="arm@profile that it is compared with")
    factors: tuple[str, ...] = Field(
        default=(), description="keys in which the two arms may differ; with any other difference it is refused"
    )
    test: Literal["differs", "reaches"] = Field(default="differs", description="reaches: worse by less than `margin`?")
    margin: PositiveFloat | None = Field(
        default=None, description="of `reaches`, a share: 0.01 is one point of accuracy (--margin 1 on a command line)"
    )

    def _conflicts(self) -> Iterator[str]:
        if (self.test == "reaches") != (self.margin is not None):
            yield "`margin` belongs to `test: reaches`, which cannot be judged without one"


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
    about: str | None = later_key(None, description="what it is, in words")
    prediction: str | None = later_key(None, description="what is expected, written before the runs")
    reported: tuple[str, ...] = later_key((), description="experiments of the documents to show beside its numbers")
    criteria: tuple[Criterion, ...] = later_key((), description="bands of its numbers, and what comes next on each")

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.seeds)) != len(self.seeds):
            yield f"a seed is named twice in {list(self.seeds)}"
        for name, content in (("base", self.base), *((f"arms.{arm}", content) for arm, content in self.arms.items())):
            if "seed" in content:
                yield f"{name}.seed: a suite runs every arm with each of its own `seeds`; name them there"
        for key, values in self.axes.items():
            if not values:
                yield f"axes.{key}: is empty; name at least one value, or drop the axis"
        if "seed" in self.axes:
            yield "axes.seed: the seeds of a suite stand in its own `seeds`"
        for arm in self.arms:
            if not arm or any(c in arm for c in "@/\\ "):
                yield f"arm {arm!r}: a name has no '@', slash or space (arm@profile names a measurement)"
