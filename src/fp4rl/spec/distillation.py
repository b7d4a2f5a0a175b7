"""Distillation, and the teachers that it may learn from."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from fp4rl.spec.frozen import LocalPath, Spec, later_key
from fp4rl.spec.stages import OF_THE_ARM


class TeacherModel(Spec):
    """A teacher that is neither the start nor the live model: exactly one of `arm` and `path`."""

    arm: str | None = later_key(None, description="an arm of the same suite: what its run with the same seed trained")
    path: LocalPath | None = later_key(None, description="a Hugging Face folder with the same tokenizer")
    digest: str | None = later_key(None, description=OF_THE_ARM)

    def _conflicts(self) -> Iterator[str]:
        if (self.arm is None) == (self.path is None):
            yield "name exactly one of `arm` and `path`, or write start or live"


class Distillation(Spec):
    """Distillation to the unquantized model on the student's own samples (QAD).

    `teacher`: the model as it was at the `start`, the `live` weights without quantization, which learn along, or a
    model of its own: what another arm trained, or a folder.
    """

    coef: PositiveFloat = 1.0
    teacher: Literal["start", "live"] | TeacherModel = "start"
    direction: Literal["forward", "reverse"] = "forward"
    alone: bool = Field(default=False, description="leave the reinforcement-learning loss out")
