"""AQN, adaptive quantization noise: what is added to which weights while the policy samples.

The geometric schedule is QeRL's (arXiv 2510.11696, section 3.3); the epoch-aware one repeats a fade in every epoch. A
schedule of your own is a class here with a `kind` and an `at`, and its name in NoiseSchedule.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PositiveFloat, PositiveInt

from fp4rl.spec.frozen import Spec


class Fade(Spec):
    """The base of schedules in which sigma, the noise's standard deviation, fades from start to end over a run."""

    by_ratio: ClassVar[bool] = False  # a fade by ratios never reaches zero
    kind: str
    sigma_start: PositiveFloat = Field(default=5e-2, description="standard deviation at first")
    sigma_end: float = Field(default=5e-4, ge=0.0, description="standard deviation at last")

    @abstractmethod
    def at(self, step: int, total: int) -> float:
        """Return sigma in `step`, counted from 0, of a run of `total` steps."""

    @property
    def steps_for_all(self) -> int:
        """Steps of the shortest run that reaches every value; 0 for a smooth fade, which has one per step."""
        return 0

    def _conflicts(self) -> Iterator[str]:
        if self.sigma_end > self.sigma_start:
            ends = f"{self.sigma_end:g} is above sigma_start {self.sigma_start:g}"
            yield f"sigma_end: {ends}: the noise would grow; swap them"
        if self.by_ratio and self.sigma_end == 0:
            yield (
                "sigma_end: is 0, and a geometric fade never reaches zero; name the last value you want, such as "
                "0.0005, or write `noise: none`"
            )

    def _by_ratio(self, share: float | Fraction) -> float:
        return float(self.sigma_start * (self.sigma_end / self.sigma_start) ** share)

    def _between(self, left: float) -> float:
        return self.sigma_end + (self.sigma_start - self.sigma_end) * left


def _at_least(fewest: int) -> AfterValidator:
    def enough(stages: int) -> int:
        if stages < fewest:
            raise ValueError(f"{stages} stages are too few for a fade; use at least {fewest}, or constant")
        return stages

    return AfterValidator(enough)


class Geometric(Fade):
    """`num_stages` equal intervals of the run: the first one silent, then values that fade by equal ratios."""

    by_ratio: ClassVar[bool] = True
    kind: Literal["geometric"] = "geometric"
    num_stages: Annotated[int, _at_least(3)] = Field(
        default=10, description="equal intervals of the run, the first one silent"
    )

    def at(self, step: int, total: int) -> float:
        """Return start * (end/start)^(i/(K-2)) in interval i + 1 = floor(step K / total), K = num_stages; 0 before."""
        interval = step * self.num_stages // total
        return self._by_ratio((interval - 1) / (self.num_stages - 2)) if interval else 0.0

    @property
    def steps_for_all(self) -> int:
        """One step for each interval."""
        return self.num_stages


class EpochAware(Fade):
    """Epoch e fades from b_e to b_(e+1), b_e = start * (end/start)^(e/epochs), after a silent 1/(stages + 1) of it."""

    by_ratio: ClassVar[bool] = True
    kind: Literal["epoch_aware"] = "epoch_aware"
    epochs: PositiveInt = Field(default=1, description="parts of the run, each with a fade of its own")
    stages_per_epoch: Annotated[int, _at_least(2)] = Field(default=5, description="values in each")

    def at(self, step: int, total: int) -> float:
        """Return sigma in `step` where all epochs are equally long."""
        return self.at_share(Fraction(step, total))

    def at_share(self, share: Fraction) -> float:
        """Return sigma when this share of the epochs, exact and below 1, is done: in floats 3 * (1/3) can miss 1."""
        epoch, inside = divmod(share * self.epochs, 1)
        slot = int(inside * (self.stages_per_epoch + 1))
        return self._by_ratio((epoch + (slot - 1) / (self.stages_per_epoch - 1)) / self.epochs) if slot else 0.0

    @property
    def steps_for_all(self) -> int:
        """One step for each value of each epoch, and one for its silence."""
        return self.epochs * (self.stages_per_epoch + 1)


class Linear(Fade):
    """A straight line from the first step to the last."""

    kind: Literal["linear"] = "linear"

    def at(self, step: int, total: int) -> float:
        """Return the line's value, `sigma_start` in a run of one step."""
        return self._between(1 - step / max(total - 1, 1))


class Cosine(Fade):
    """Half a cosine from the first step to the last."""

    kind: Literal["cosine"] = "cosine"

    def at(self, step: int, total: int) -> float:
        """Return the cosine's value, `sigma_start` in a run of one step."""
        return self._between(0.5 * (1 + math.cos(math.pi * (step / max(total - 1, 1)))))


class Constant(Spec):
    """The same sigma at every step."""

    steps_for_all: ClassVar[int] = 0
    kind: Literal["constant"] = "constant"
    sigma: PositiveFloat = Field(default=1e-2, description="standard deviation at every step")

    def at(self, step: int, total: int) -> float:  # noqa: ARG002
        """Return `sigma`."""
        return self.sigma


def _word_to_schedule(value: Any) -> Any:
    """Expand `schedule: cosine` to `schedule: {kind: cosine}`; a mapping without a kind is geometric."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "geometric", **value}
    return value


NoiseSchedule = Annotated[
    Annotated[Geometric | EpochAware | Constant | Linear | Cosine, Field(discriminator="kind")],
    BeforeValidator(_word_to_schedule),
]


class NoiseTargets(Spec):
    """Which weights take noise. Routers, embeddings, the output head and adapters never do."""

    kinds: tuple[Literal["norm", "linear"], ...] = Field(
        default=("norm",), min_length=1, description="linear: of linear layers and of experts"
    )
    final_norm: bool = True
    qk_norms: bool = Field(default=False, description="the norms of queries and keys inside attention")
    moe: Literal["post_attention", "all"] = Field(
        default="post_attention", description="in layers with experts: only the norm before them, or every norm"
    )
    leave: tuple[str, ...] = Field(default=(), description="patterns of parameter names that take no noise")


class Factor(Spec):
    """A multiplier that may change once, at a share of the run. A bare number is a constant one."""

    value: float = Field(default=1.0, ge=0.0)
    later: float | None = Field(default=None, ge=0.0)
    changes_at: float | None = Field(default=None, gt=0.0, lt=1.0, description="share of the run")

    def _conflicts(self) -> Iterator[str]:
        if (self.later is None) != (self.changes_at is None):
            yield "a factor that changes needs both `later` and `changes_at` (a share of the run)"


AnyFactor = Annotated[
    Factor, BeforeValidator(lambda value: {"value": value} if isinstance(value, int | float) else value)
]


class Zones(Spec):
    """The layers at both ends of the model, and the ones between them."""

    edge_share: float = Field(default=0.2, gt=0.0, lt=0.5, description="share of the layers at each end, at least one")
    edge: AnyFactor = Factor()
    middle: AnyFactor = Factor()


ByLayer = Annotated[
    tuple[tuple[int, float], ...],
    BeforeValidator(lambda value: tuple(value.items()) if isinstance(value, dict) else value),
    AfterValidator(lambda pairs: tuple(sorted(pairs))),
    PlainSerializer(dict, return_type=dict[int, float]),
]
"""Layer and factor, a mapping in files."""


class Multipliers(Spec):
    """Factors on sigma: a layer's own value first, else its zone's, else `others` (the final norm has no layer)."""

    by_layer: ByLayer = Field(
        default=(),
        description="factor of each layer, such as {0: 2.0}",
        json_schema_extra={"kind": "layer: number", "default": {}},
    )
    zones: Zones | None = None
    others: float = Field(default=1.0, ge=0.0, description="factor of what has no factor of its own")

    def _conflicts(self) -> Iterator[str]:
        layers = [layer for layer, _ in self.by_layer]
        if len(set(layers)) != len(layers):
            yield "by_layer: a layer stands twice"
        if bad := [pair for pair in self.by_layer if min(pair) < 0]:
            yield f"by_layer: layer numbers and factors go from 0 up, got {bad[0]}"


class Noise(Spec):
    """Gaussian noise of a scheduled size on chosen weights during rollouts, drawn anew for each; training, evaluation
    and the reference have clean weights.

    `precision: weight` writes noisy weights in the weight's own dtype (as published; BF16 swallows what is below half a
    step). `precision: float32` computes the norm itself with the noisy weight in FP32; norms only.
    `logprobs` says with which weights the loss computes its log-probabilities; with `clean`, the difference to the
    noisy sampler is left to `training.rollout_correction`. `control` turns the arm into a control: `sigma_zero` runs
    all of the code with sigma 0, `bf16` is the same noise on an unquantized model (it sets `injection: none`).
    """

    schedule: NoiseSchedule = Geometric()
    targets: NoiseTargets = NoiseTargets()
    multipliers: Multipliers = Multipliers()
    operation: Literal["additive", "multiplicative"] = Field(default="additive", description="w + noise, w (1 + noise)")
    precision: Literal["weight", "float32"] = Field(
        default="weight", description="weight: in the weight's dtype; float32: norms compute with the noisy weight"
    )
    logprobs: Literal["clean", "noisy"] = Field(default="clean", description="weights that the loss is computed with")
    control: Literal["no", "sigma_zero", "bf16"] = Field(
        default="no", description="sigma_zero: all of the code with sigma 0; bf16: the noise without an injection"
    )

    def _conflicts(self) -> Iterator[str]:
        if self.precision == "float32" and "linear" in self.targets.kinds:
            yield "precision: float32 exists for norms only; take `linear` out of targets.kinds"
