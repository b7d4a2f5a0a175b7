"""Where tokens share a scale, so that numbers depend on the batch."""

from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS, Phase


def shared_scales(injection: Injection | None, *phases: Phase) -> tuple[str, ...]:
    """List the points of `injection` at which tokens share a scale in any of `phases`, such as `input nvfp4`.

    Under `factor: tensor` NVFP4 has one FP32 factor, and FP8 one scale, for the whole tensor of a call; a block of 32 x
    32 spans 32 tokens. Decoding one token and scoring a whole answer then round the same value differently, and so do
    two batch sizes. Weights are the same tensor in every call, so they may share what they like.
    """
    if injection is None:
        return ()
    active = frozenset[str]().union(*(injection.apply_during.active(phase) for phase in phases))
    points = dict[str, None]()
    for point in ("input", "output", "kv_cache", *GRADIENTS):
        first = injection.formats_before(point) if set(phases) - {"evaluation"} else ()
        for fmt in (*injection.formats_at(point), *first) if point in active else ():
            if fmt.spans_rows:
                points[f"{point} {fmt.name}"] = None
    return tuple(points)


def batch_note(injection: Injection | None, *phases: Phase) -> str | None:
    """Return a sentence that numbers under `injection` depend on the batch; None where they do not."""
    shared = shared_scales(injection, *phases)
    if not shared:
        return None
    return f"{', '.join(shared)}: tokens of one call share a scale, so these numbers depend on the batch size"
