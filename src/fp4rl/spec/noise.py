"""AQN, adaptive quantization noise: what is added to which weights while the policy samples.

The geometric schedule is QeRL's (arXiv 2510.11696, section 3.3); the epoch-aware one repeats a fade in every epoch.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from fp4rl.spec.frozen import Spec


def _above_zero(sigma: float) -> float:
    if sigma <= 0:
        raise ValueError(
            f"sigma_end is {sigma:g}, and a geometric fade never reaches zero; name the last value you want, such as "
            "0.0005, or write `noise: none`"
        )
    return sigma


def _enough_stages(stages: int) -> int:
    if stages < 3:
        raise ValueError(
            f"num_stages is {stages}, but one stage is silent and a fade needs two values; use at least 3, or the "
            "constant schedule"
        )
    return stages


def _enough_values(stages: int) -> int:
    if stages < 2:
        raise ValueError(f"stages_per_epoch is {stages}, but a fade needs two values; use at least 2")
    return stages


def _fades(start: float, end: float) -> None:
    if end > start:
        raise ValueError(f"sigma_end {end:g} is above sigma_start {start:g}: the noise would grow; swap them")


class Geometric(Spec):
    """`num_stages` equal intervals of the run: the first one silent, then values that fade by equal ratios."""

    kind: Literal["geometric"] = "geometric"
    sigma_start: PositiveFloat = Field(default=5e-2, description="standard deviation at first")
    sigma_end: float = Field(default=5e-4, description="standard deviation at last")
    num_stages: int = Field(default=10, description="equal intervals of the run, the first one silent")

    _end = field_validator("sigma_end")(_above_zero)
    _stages = field_validator("num_stages")(_enough_stages)

    @model_validator(mode="after")
    def _fading(self) -> "Geometric":
        _fades(self.sigma_start, self.sigma_end)
        return self


class EpochAware(Spec):
    """Epoch e fades from b_e to b_(e+1), b_e = start * (end/start)^(e/epochs), after a silent 1/(stages + 1) of it."""

    kind: Literal["epoch_aware"] = "epoch_aware"
    sigma_start: PositiveFloat = Field(default=5e-2, description="standard deviation at first")
    sigma_end: float = Field(default=5e-4, description="standard deviation at last")
    epochs: PositiveInt = Field(default=1, description="parts of the run, each with a fade of its own")
    stages_per_epoch: int = Field(default=5, description="values in each")

    _end = field_validator("sigma_end")(_above_zero)
    _stages = field_validator("stages_per_epoch")(_enough_values)

    @model_validator(mode="after")
    def _fading(self) -> "EpochAware":
        _fades(self.sigma_start, self.sigma_end)
        return self


class Constant(Spec):
    """The same sigma at every step."""

    kind: Literal["constant"] = "constant"
    sigma: PositiveFloat = Field(default=1e-2, description="standard deviation at every step")


class Linear(Spec):
    """A straight line from the first step to the last."""

    kind: Literal["linear"] = "linear"
    sigma_start: PositiveFloat = Field(default=5e-2, description="standard deviation at first")
    sigma_end: float = Field(default=5e-4, ge=0.0, description="standard deviation at last")

    @model_validator(mode="after")
    def _fading(self) -> "Linear":
        _fades(self.sigma_start, self.sigma_end)
        return self


class Cosine(Spec):
    """Half a cosine from the first step to the last."""

    kind: Literal["cosine"] = "cosine"
    sigma_start: PositiveFloat = Field(default=5e-2, description="standard deviation at first")
    sigma_end: float = Field(default=5e-4, ge=0.0, description="standard deviation at last")

    @model_validator(mode="after")
    def _fading(self) -> "Cosine":
        _fades(self.sigma_start, self.sigma_end)
        return self


def _word_to_schedule(value: Any) -> Any:
    """`schedule: cosine` is short for `schedule: {kind: cosine}`; a mapping without a kind is geometric."""
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

    kinds: tuple[Literal["norm", "linear"], ...] = Field(default=("norm",), min_length=1)
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

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"value": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _both_or_neither(self) -> "Factor":
        if (self.later is None) != (self.changes_at is None):
            raise ValueError("a factor that changes needs both `later` and `changes_at` (a share of the run)")
        return self


class Zones(Spec):
    """The layers at both ends of the model, and the ones between them."""

    edge_share: float = Field(default=0.2, gt=0.0, lt=0.5, description="share of the layers at each end, at least one")
    edge: Factor = Factor()
    middle: Factor = Factor()


class Multipliers(Spec):
    """Factors on sigma: a layer's own value first, else its zone's, else `others` (the final norm has no layer)."""

    by_layer: tuple[tuple[int, float], ...] = Field(
        default=(),
        description="factor of each layer, such as {0: 2.0}",
        json_schema_extra={"kind": "layer: number", "default": {}},
    )
    zones: Zones | None = None
    others: float = Field(default=1.0, ge=0.0, description="factor of what has no factor of its own")

    @field_validator("by_layer", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, dict) else value

    @field_serializer("by_layer")
    def _as_mapping(self, value: tuple[tuple[int, float], ...]) -> dict[int, float]:
        return dict(value)

    @field_validator("by_layer")
    @classmethod
    def _sane(cls, value: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        layers = [layer for layer, _ in value]
        if len(set(layers)) != len(layers):
            raise ValueError("a layer stands twice in multipliers.by_layer")
        if bad := [pair for pair in value if pair[0] < 0 or pair[1] < 0]:
            raise ValueError(f"multipliers.by_layer wants layer numbers and factors from 0 up, got {bad[0]}")
        return tuple(sorted(value))


class Noise(Spec):
    """Gaussian noise of a scheduled size on chosen weights, fresh from the clean weights at every rollout, there only:
    training, evaluation and the reference see clean weights.

    `precision: weight` writes noisy weights in the weight's own dtype (as published; BF16 swallows what is below half a
    step). `precision: float32` computes the norm itself with the noisy weight in FP32; norms only.
    `logprobs` says under which weights the loss computes its log-probabilities; what sampling under noise then differs
    by is corrected by `training.rollout_correction`. `control` turns the arm into a control: `sigma_zero` walks every
    step of the machinery with sigma 0, `bf16` is the same noise on an unquantized model (it sets `injection: none`).
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
        default="no", description="sigma_zero: all steps of it with sigma 0; bf16: the noise without an injection"
    )

    @model_validator(mode="after")
    def _carried(self) -> "Noise":
        if self.precision == "float32" and "linear" in self.targets.kinds:
            raise ValueError("precision: float32 exists for norms only; take `linear` out of targets.kinds")
        return self
