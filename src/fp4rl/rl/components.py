"""What a trainer is made of besides the model, so that the file that touches TRL holds nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fp4rl.rl.events import Emit
from fp4rl.rl.fill import PromptStream
from fp4rl.rl.generate import Sampler, transformers_sampler
from fp4rl.rl.phases import Phases
from fp4rl.rl.reference import FrozenPolicy
from fp4rl.rl.rewards import Rewarder
from fp4rl.spec.training import Training


class Supervisor(Protocol):
    """Decides between the steps of a trainer, and keeps what a checkpoint needs besides the trainer's own files."""

    def on_begin(self, trainer: Any) -> None:
        """Model, optimizer and scheduler are there, and those of a checkpoint have been loaded."""

    def on_step(self, step: int, metrics: dict[str, float]) -> bool:
        """Take the metrics of a step; return whether to stop."""
        ...

    def on_boundary(self, step: int) -> tuple[bool, bool]:
        """After the last update from a rollout: return whether to write a checkpoint, and whether to stop."""
        ...

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The trainer has written its files of a checkpoint into `folder`."""


@dataclass(frozen=True)
class TrainerComponents:
    """What a trainer is made of besides the model. `float_masters`: updates are made to weights in FP32."""

    recipe: Training
    stream: PromptStream
    rewarder: Rewarder
    phases: Phases
    reference: FrozenPolicy | None
    teacher: FrozenPolicy | None
    supervisor: Supervisor
    emit: Emit
    seed: int
    float_masters: bool = True
    sampler: Sampler = transformers_sampler
