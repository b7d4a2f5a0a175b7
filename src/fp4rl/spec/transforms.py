"""Transforms of the start model that keep its function and make its tensors easier to round, and their evidence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, NonNegativeInt, PositiveInt

from fp4rl.spec.frozen import Record, Spec

Pair = Literal["norm", "down", "o"]


class RotateResidual(Spec):
    """Turn the residual stream by a random Hadamard matrix, norms' weights folded into what reads them (QuaRot,
    arXiv 2404.00456; R1 of SpinQuant). A head that shares the embedding's weight gets one of its own."""

    name: Literal["rotate_residual"] = "rotate_residual"
    seed: NonNegativeInt = Field(default=0, description="of a rotation's random signs")


class RotateHeads(Spec):
    """Turn the values of every attention head, between `v_proj` and `o_proj`, by a random Hadamard matrix (R2 of
    SpinQuant, arXiv 2405.16406)."""

    name: Literal["rotate_heads"] = "rotate_heads"
    seed: NonNegativeInt = 0


class Smooth(Spec):
    """Move the size of channels from inputs into weights (SmoothQuant, arXiv 2211.10438, eq. 4): channel j of an input
    is divided by max|X_j|^alpha / max|W_j|^(1 - alpha), and column j of its weights is multiplied by it."""

    name: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.5, ge=0.0, le=1.0, description="1: inputs alone decide, 0: weights alone")
    prompts: PositiveInt = Field(default=32, description="problems of the training split that inputs are seen on")
    pairs: tuple[Pair, ...] = Field(
        default=("norm", "down", "o"),
        min_length=1,
        description="where: norm to its linear layers, up_proj to down_proj, v_proj to o_proj",
    )

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.pairs)) < len(self.pairs):
            yield f"pairs names {next(p for p in self.pairs if self.pairs.count(p) > 1)} twice; drop one"


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Transform = Annotated[
    Annotated[RotateResidual | RotateHeads | Smooth, Field(discriminator="name")], BeforeValidator(_named)
]
"""One transform; its name alone stands for it with its defaults."""


def prompts_needed(transforms: Sequence[RotateResidual | RotateHeads | Smooth]) -> int:
    """Return how many training problems the transforms look at."""
    return max((step.prompts for step in transforms if isinstance(step, Smooth)), default=0)


def unties(transforms: Sequence[RotateResidual | RotateHeads | Smooth]) -> bool:
    """Return whether the head has a weight of its own after the transforms, whatever the model's configuration says."""
    return any(isinstance(transform, RotateResidual) for transform in transforms)


class Transformed(Record):
    """What was done to the start model, in order, without a change of its function.

    `difference`: the largest change of a logit over the largest logit, in float32, on so many `tokens`; it had to be
    within `tolerance`. `stored_difference`: the same of the weights as they are kept, in the model's dtype. `untied`:
    the head shared the embedding's weight before. `of`: the digest of the model before. All are None where the start
    came so from another run.
    """

    kind: Literal["transformed"] = Field("transformed", exclude=True)
    transforms: tuple[Mapping[str, JsonValue], ...]
    difference: float | None = None
    stored_difference: float | None = None
    tolerance: float | None = None
    tokens: int | None = None
    untied: bool | None = None
    of: str | None = None
