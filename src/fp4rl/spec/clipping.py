"""Weights that are clamped at a learned share of their block's largest magnitude before they are rounded."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from fp4rl.spec.frozen import Record, Spec
from fp4rl.spec.injection import Injection
from fp4rl.spec.oscillation import Oscillation


class LearnedClipping(Spec):
    """Each block of a trained weight that is rounded is clamped at sigmoid(strength) times its largest magnitude, and
    the strengths are learned (LWC of OmniQuant, arXiv 2308.13137). The defaults are those of the paper's code."""

    init: float = Field(default=4.0, description="every strength at first; 4: clamped at .982 of the largest magnitude")
    lr: PositiveFloat = Field(default=1e-2, description="learning rate of the strengths; it follows lr_scheduler")

    def refused(self, injection: Injection | None, oscillation: Oscillation | None) -> Iterator[str]:
        """Yield why it cannot act under an injection and beside what holds weights at their levels."""
        trained = injection is not None and "training" in injection.apply_during.weight
        formats = (
            [fmt for fmt in injection.formats_at("weight") if fmt.scale != "none"] if injection and trained else []
        )
        if not formats:
            yield "no weight has blocks in training; name a format for injection.weight, or leave it out"
        for fmt in formats:
            if fmt.rotation is not None:
                yield f"{fmt.name} with a rotation: what is rounded is not what is clamped; leave one of both out"
        if injection is not None and injection.schedule is not None and injection.schedule.weight is not None:
            yield "injection.schedule.weight rounds otherwise in some steps, and all are clamped; leave one of both out"
        if oscillation is not None and (oscillation.dampen or oscillation.freeze is not None):
            yield "training.oscillation.dampen and freeze write the weights before they are clamped; leave them out"


class Clipped(Record):
    """One layer's learned clipping at the end of a run: the share of its weights that are clamped, the share of its
    blocks whose strength is not the first one, and the mean, least and largest of what it multiplies maxima by."""

    kind: Literal["clipping"] = Field("clipping", exclude=True)
    layer: int | None
    weights: int
    blocks: int
    clipped: float
    learned: float
    mean: float
    least: float
    largest: float
