"""Which model a run starts from: an embedded one, or a Hugging Face folder on this disk."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fp4rl.spec.frozen import LocalPath, Spec, WordOrList, later_key
from fp4rl.spec.transforms import Transform

Dtype = Literal["float32", "bfloat16", "float16"]
# Those of transformers whose matmuls can be met; the others are kernels that read the weight themselves.
ExpertsImplementation = Literal["eager", "grouped_mm", "batched_mm"]


Size = Literal["s", "m", "l"]
# Word -> size, where a model or a folder may be named.
EMBEDDED: Mapping[str, Size] = {"embedded": "s", "embedded-m": "m", "embedded-l": "l"}
# Defaults of each size, beside those of the fields themselves.
SIZES: Mapping[Size, Mapping[str, Any]] = {
    "s": {},
    "m": {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 256,
        "initializer_range": 0.04,
        "warm_up_steps": 600,
        "warm_up_batch_size": 32,
        "warm_up_lr": 1e-3,
    },
    "l": {
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "intermediate_size": 1536,
        "initializer_range": 0.02,
        "warm_up_steps": 1500,
        "warm_up_lr": 5e-4,
        "warm_up_on": "accelerator",
    },
}


def embedded(word: str) -> dict[str, Any] | None:
    """Return the description of an embedded model that is named by a word; None for any other word."""
    size = EMBEDDED.get(word)
    return None if size is None else {"embedded": {} if size == "s" else {"size": size}}


class Embedded(Spec):
    """The Qwen2-shaped model that is built here and warmed up on sloppy demonstrations of the arithmetic task.

    `size` gives the other fields their defaults: s has 0.1 million weights, m 1.9 and l 41; l is warmed up on an
    accelerator. These fields and the text of its demonstrations decide what it becomes; its folder in the cache is
    named by a digest of both, so that arms and seeds share one warm-up. Widths are multiples of 32, so that every
    linear layer divides into MX blocks.
    """

    size: Size = later_key("s", description="defaults of the fields below; `model: embedded-m` is size m")
    seed: NonNegativeInt = Field(default=0, description="initial weights, order of the demonstrations")
    hidden_size: PositiveInt = Field(default=64, multiple_of=32)
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 2
    intermediate_size: PositiveInt = Field(default=192, multiple_of=32)
    tie_word_embeddings: bool = True
    # 0.02, the usual value, is made for widths in the thousands; at 64 it leaves some seeds untrained after 450 steps.
    initializer_range: PositiveFloat = 0.08
    warm_up_steps: NonNegativeInt = 450
    warm_up_batch_size: PositiveInt = 64
    warm_up_lr: PositiveFloat = 3e-3
    warm_up_rise: float = Field(default=0.1, ge=0.0, lt=1.0, description="share of the steps in which lr rises")
    warm_up_on: Literal["cpu", "accelerator"] = later_key(
        "cpu", description="cpu: one thread, the same on every machine of its kind; accelerator: the one of torch"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_defaults_of_its_size(cls, value: object) -> object:
        if isinstance(value, dict) and isinstance(size := value.get("size"), str):
            return {**SIZES.get(size, {}), **value}  # type: ignore[call-overload]
        return value

    def _conflicts(self) -> Iterator[str]:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            yield f"hidden_size {self.hidden_size} does not split into {self.num_heads} heads of even width"

    @property
    def examples_needed(self) -> int:
        """The number of demonstrations for a warm-up that sees none twice."""
        return self.warm_up_steps * self.warm_up_batch_size


class Lora(Spec):
    """A LoRA adapter on every linear layer of the decoder (peft's `all-linear`), or on those that are named.

    Experts that are stacked in one parameter are no linear layers: `target_parameters` names them. Of Mixtral, Qwen-MoE
    and their kin peft's `all-linear` takes them too, with their routers.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    rslora: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Annotated[tuple[str, ...], WordOrList] = later_key(
        ("all-linear",), description="last names of the layers, such as [q_proj, v_proj]; all-linear: every one"
    )
    target_parameters: Annotated[tuple[str, ...], WordOrList] = later_key(
        (), description="ends of the names of stacked experts, such as [experts.gate_up_proj, experts.down_proj]"
    )

    def _conflicts(self) -> Iterator[str]:
        if len(self.target_modules) > 1 and "all-linear" in self.target_modules:
            yield "target_modules names layers, or is all-linear alone"
        if not (self.target_modules or self.target_parameters):
            yield "target_modules and target_parameters are both empty; name a layer, or write all-linear"
        if self.target_parameters and self.dropout:
            yield "target_parameters: an adapter of stacked experts is a sum of weights, which takes no dropout; set 0"


class Model(Spec):
    """Exactly one of `embedded` and `path`; `embedded` when neither is named."""

    path: LocalPath | None = Field(
        default=None, description="a Hugging Face folder on this disk; nothing is downloaded"
    )
    embedded: Embedded | None = None
    dtype: Dtype = Field(default="float32", description="of the weights and of the arithmetic around what is rounded")
    master_dtype: Dtype = Field(
        default="float32", description="of the weights that the optimizer updates: float32, or the dtype itself"
    )
    lora: Lora | None = None
    experts_implementation: ExpertsImplementation | None = later_key(
        None, description="how stacked experts are computed; none: as the folder says, else grouped_mm, else eager"
    )
    transforms: tuple[Transform, ...] = later_key(
        (), description="what is done to the start model in turn, without a change of its function"
    )

    @property
    def embedded_word(self) -> str:
        """The word that names the size of the embedded model; `embedded` where a folder is named."""
        size = self.embedded.size if self.embedded is not None else "s"
        return next(word for word, named in EMBEDDED.items() if named == size)

    @property
    def coarse_masters(self) -> bool:
        """Whether updates are made to weights of low precision. Adapters are kept in float32 in any case."""
        return self.master_dtype != "float32" and self.lora is None

    @property
    def smallest_change(self) -> float:
        """Half a step of the dtype, as a share of a weight: an update below it leaves the weight as it was."""
        return {"float32": 2.0**-25, "bfloat16": 2.0**-9, "float16": 2.0**-12}[self.dtype]

    @model_validator(mode="before")
    @classmethod
    def _embedded_unless_a_path_is_named(cls, value: object) -> object:
        if isinstance(value, str):
            return embedded(value) or {"path": value}
        if isinstance(value, dict) and not value.get("path") and not value.get("embedded"):
            return {**value, "embedded": {}}
        return value

    def _conflicts(self) -> Iterator[str]:
        if self.master_dtype not in ("float32", self.dtype):
            yield f"master_dtype {self.master_dtype} is neither float32 nor the dtype {self.dtype}"
        if self.path is not None and self.embedded is not None:
            yield "name either `path` or `embedded`, not both"
        if self.experts_implementation is not None and self.embedded is not None:
            yield "experts_implementation: the embedded model has no experts; leave it out"
