"""What should act in a phase, and that it did: records which stand beside the counters of `inject.evidence`."""

from fp4rl.inject.attach import Attachment
from fp4rl.inject.probe import require_rounded
from fp4rl.spec.evidence import Acting, Rounded
from fp4rl.spec.modes import Phase


def acting(attachment: Attachment, phase: Phase, step: int | None = None, profile: str | None = None) -> Acting:
    """Points and hardware errors of a phase, with the number of sites at which each is to act."""
    line = Acting(phase=phase, points=attachment.table.acting(phase))
    return line if profile is None else line.extended(profile=profile, step=step)


def rounded(attachment: Attachment, step: int, profile: str | None = None) -> Rounded:
    """The operands of the present phase's matmuls were held against their masters. CheckFailed when they differ."""
    line = Rounded(phase=attachment.phase, sites=require_rounded(attachment), step=step)
    return line if profile is None else line.extended(profile=profile)
