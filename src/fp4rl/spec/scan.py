"""The settings of a scan of a model, and of `fp4rl scan` as a whole."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fp4rl.spec.former_names import of_deployment
from fp4rl.spec.frozen import LocalPath, Spec, WordOrList

ScanPart = Literal["precision", "sensitivity", "depth", "dynamics"]
NoiseRule = Literal["global", "targeted", "healthy_only", "proportional", "inverse", "zones"]
Piece = Literal["formats", "noise", "leave", "weight_format"]
Threshold = Literal["sqnr", "deadzone", "saturation", "relative_error", "relative_l1", "gain_ratio", "kurtosis_ratio"]


class Scan(Spec):
    """What is measured, and how.

    `precision` needs the weights alone (inputs only with texts); the other parts feed texts through the model.
    """

    parts: Annotated[tuple[ScanPart, ...], WordOrList] = Field(
        default=("precision", "sensitivity", "depth", "dynamics"), min_length=1, description="what is measured"
    )
    measured: bool = Field(
        default=True, description="false: sensitivity is estimated by a backward pass instead of measured site by site"
    )
    measured_experts: NonNegativeInt = Field(
        default=8,
        description="stacked experts measured one by one, those of the largest estimate; others are estimated",
    )
    leave_one_out: bool = Field(default=False, description="also measure what leaving each site out saves")
    batch_size: PositiveInt = Field(default=8, description="texts in a batch")
    longest: PositiveInt = Field(default=256, description="tokens of a text that are used")
    probed_batches: PositiveInt = Field(default=1, description="batches whose layers are probed for faults")
    seed: NonNegativeInt = Field(default=0, description="of the probes and of the answers that the estimate draws")


class ScanRequest(Scan):
    """The settings of `fp4rl scan`: which injection in the model, which texts, what is measured, what is advised.

    The rest is said by the keys `model`, `task` and `injection` of an experiment.
    """

    arm: str | None = Field(default=None, description="arm of a suite; by default the first that rounds something")
    format: str | None = Field(default=None, description="another format wherever a linear layer is rounded")
    deployment: str | None = Field(default=None, description="another deployment, by its name")
    leave: Annotated[tuple[str, ...], WordOrList] = Field(
        default=(), description="patterns of sites that are left out too"
    )
    text: LocalPath | None = Field(default=None, description="text file to calibrate on, instead of the task")
    texts: PositiveInt = Field(default=32, description="how many texts of the task")
    weights_only: bool = Field(default=False, description="read the weights from their files, never load the model")
    site: str | None = Field(default=None, description="the weight whose distribution is shown; else the worst")
    limits: dict[Threshold, float] = Field(
        default_factory=dict, description="other limits of fixed thresholds, such as sqnr: 18"
    )
    take: Annotated[tuple[Piece, ...] | None, WordOrList] = Field(
        default=None,
        description="pieces that the advice holds: formats, noise, leave, weight_format; else its strategy's",
    )
    noise_rule: NoiseRule = Field(default="proportional", description="how noise multipliers follow from the scan")
    bits: PositiveFloat = Field(default=4.5, description="average bits a weight for mixed formats")

    @model_validator(mode="before")
    @classmethod
    def _in_present_words(cls, value: Any) -> Any:
        return of_deployment(value) if isinstance(value, Mapping) else value
