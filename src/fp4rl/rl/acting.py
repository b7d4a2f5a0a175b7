"""What should act in a phase, and that it did: records which stand beside the counters of `inject.evidence`."""

from typing import Any

from fp4rl.inject.attach import Attachment
from fp4rl.inject.probe import require_rounded
from fp4rl.spec.modes import Phase


def acting(attachment: Attachment, phase: Phase) -> dict[str, Any]:
    """Points and hardware errors of a phase, with the number of sites at which each is to act."""
    return {"kind": "acting", "phase": phase, "points": attachment.table.acting(phase)}


def rounded(attachment: Attachment) -> dict[str, Any]:
    """The operands of the present phase's matmuls were held against their masters. CheckFailed when they differ."""
    return {"kind": "rounded", "phase": attachment.phase, "sites": require_rounded(attachment)}
