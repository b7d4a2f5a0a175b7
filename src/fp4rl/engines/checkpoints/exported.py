"""What an export left on disk."""

from dataclasses import dataclass, field
from pathlib import Path

from fp4rl.engines.checkpoints.layouts.layout import Layout, Stored
from fp4rl.engines.checkpoints.policy import Policy
from fp4rl.engines.checkpoints.source import Source


@dataclass(frozen=True)
class Exported:
    """A written checkpoint: where, what of, the files of its tensors, and what was overridden to write it."""

    folder: Path
    source: Source
    policy: Policy = field(repr=False)
    layout: Layout
    stored: Stored
    bits: float  # that a value of the rounded weights takes, its share of the scales among them
    overridden: tuple[str, ...] = ()
