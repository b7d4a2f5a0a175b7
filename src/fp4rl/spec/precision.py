"""Precision that changes over the steps of training: another format at a point first, then the injection's own."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Literal

from pydantic import Field

from fp4rl.spec.formats import Format
from fp4rl.spec.frozen import NoneIsAWord, Spec
from fp4rl.spec.points import ApplyDuring, PointFormat

Stage = Literal["before", "blend", "after"]
"""The part of a schedule that a step is in."""


class PointSchedule(Spec):
    """One point's way to its format.

    Steps are counted from 0. Those below `from_step` compute in `before`. The next `over` ones compute in `before(x) +
    lambda (after(x) - before(x))`, where lambda rises evenly, 1 / (over + 1) at a step; all later ones in the
    injection's own format, `after`. Where a site has no format at the point, it has no `before` either.
    """

    before: PointFormat = Field(default=None, description="the format until then; none: not rounded")
    from_step: int = Field(ge=0, description="the first step, counted from 0, that is not in `before` alone")
    over: int = Field(default=0, ge=0, description="steps from there on that blend both; 0: the format changes at once")

    def share(self, step: int | None) -> float:
        """Return lambda at a step, 0 to 1; 1 for None, which stands for everything that is not a step of training."""
        if step is None or step >= self.from_step + self.over:
            return 1.0
        return max(0, step - self.from_step + 1) / (self.over + 1)

    def stage(self, step: int | None) -> Stage:
        """Return the part of the schedule that a step is in."""
        share = self.share(step)
        return "after" if share == 1 else "blend" if share else "before"

    def stages(self, steps: int) -> dict[Stage, range]:
        """Return the stages that a run of `steps` reaches, each with its steps."""
        ends = (0, self.from_step, self.from_step + self.over, max(steps, self.from_step + self.over))
        words: tuple[Stage, ...] = ("before", "blend", "after")
        spans = {word: range(min(ends[i], steps), min(ends[i + 1], steps)) for i, word in enumerate(words)}
        return {word: span for word, span in spans.items() if span}


class PrecisionSchedule(Spec):
    """Points whose precision changes over the steps of training, in rollouts and training alike.

    Evaluations, exports and the reference of the KL in the precision of the deployment use the injection's own formats,
    which are what is deployed.
    """

    weight: Annotated[PointSchedule | None, NoneIsAWord] = None
    input: Annotated[PointSchedule | None, NoneIsAWord] = None
    output: Annotated[PointSchedule | None, NoneIsAWord] = None
    kv_cache: Annotated[PointSchedule | None, NoneIsAWord] = None

    @property
    def points(self) -> dict[str, PointSchedule]:
        """The points that it names, each with its schedule."""
        named = {point: getattr(self, point) for point in type(self).model_fields}
        return {point: own for point, own in named.items() if own is not None}

    def before(self, point: str) -> tuple[Format, ...]:
        """Return the format that stands at a point at first, none where there is none."""
        own = self.points.get(point)
        return () if own is None or own.before is None else (own.before,)

    def stage(self, step: int | None) -> tuple[Stage, ...]:
        """Return the stage of each point at a step."""
        return tuple(own.stage(step) for own in self.points.values())

    def wrong(self, after: Mapping[str, Sequence[Format]], during: ApplyDuring) -> Iterator[str]:
        """Yield what cannot be: `after` are the formats that stand at each point, `during` the phases of each."""
        for point, own in self.points.items():
            formats = after.get(point, ())
            if not formats:
                yield f"schedule.{point}: the injection has no {point} to change to; give {point} a format"
            elif all(fmt == own.before for fmt in formats):
                yield f"schedule.{point}.before would do nothing: {formats[0].name} is the format of {point} already"
            if not {"rollout", "training"} & set(getattr(during, point)):
                yield f"schedule.{point} would do nothing: apply_during.{point} names neither rollout nor training"
        for first, fmt in product(self.before("weight"), after.get("weight", ())):
            alone = first.factor == "fused" if fmt.factor != "fused" else first.spans_rows and first.factor != "fused"
            if alone:
                yield (
                    f"schedule.weight.before: {first.name} and {fmt.name} share scales between different weights, so "
                    "the layers that a kernel fuses would have no common factor in one of them; take mxfp8, or none"
                )
