"""Formats whose scale covers several tokens: what a token is rounded to then depends on the tokens beside it."""

from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.modes import Phase
from fp4rl.spec.points import GRADIENTS

_TOKEN_POINTS = ("input", "output", "kv_cache")


def shared_scales(injection: Injection | None, *phases: Phase) -> tuple[str, ...]:
    """List the points of `injection` at which tokens share a scale in any of `phases`, such as `input nvfp4`.

    NVFP4 has one FP32 factor, and FP8 one scale, for the whole tensor of a call; a block of 32 x 32 spans 32 tokens.
    Decoding one token and scoring a whole answer then round the same value differently, and so do two batch sizes.
    Weights are the same tensor in every call, so they may share what they like.
    """
    if injection is None:
        return ()
    active = frozenset[str]().union(*(injection.apply_during.active(phase) for phase in phases))
    points = dict[str, None]()
    for point in (*_TOKEN_POINTS, *GRADIENTS):
        rows = [injection, *injection.by_pattern] if point in ("input", "output") else [injection]
        for row in rows if point in active else ():
            fmt = getattr(row, point)
            if isinstance(fmt, Format) and fmt.spans_rows:
                points[f"{point} {fmt.name}"] = None
    return tuple(points)


def batch_note(injection: Injection | None, *phases: Phase) -> str | None:
    """Say in one sentence that numbers under `injection` depend on the batch; None where they do not."""
    shared = shared_scales(injection, *phases)
    if not shared:
        return None
    return f"{', '.join(shared)}: tokens of one call share a scale, so these numbers depend on the batch size"
