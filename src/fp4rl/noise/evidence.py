"""What the noise of one rollout really was: as scheduled, as realised, and how many weights it changed."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import LayerNoise, RolloutNoise
from fp4rl.spec.noise import Noise
from fp4rl.spec.words import counted

_DEVIATIONS = 7


@dataclass(frozen=True)
class NoiseEvidence:
    """One weight under noise. `sigma` is scheduled (times the multiplier), `realised` measured on the noisy weight.

    `realised` is the root mean square of the change (relative to the weight for multiplicative noise), `drawn` that of
    the noise before it was written in the weight's dtype, `share_changed` the part of the values that differ at all.
    """

    name: str
    kind: str
    layer: int | None
    multiplier: float
    sigma: float
    drawn: float
    realised: float
    share_changed: float
    elements: int

    @property
    def swallowed(self) -> int:
        """The number of values that stayed as they were, since the noise was below the resolution of the dtype."""
        return round((1 - self.share_changed) * self.elements) if self.sigma > 0 else 0


def by_layer(evidence: Iterable[NoiseEvidence]) -> tuple[LayerNoise, ...]:
    """Return the evidence pooled by layer (also over several rollouts); weights outside the layers come last."""

    def layer(item: NoiseEvidence) -> float:
        return math.inf if item.layer is None else item.layer

    return tuple(_pool(list(group)) for _, group in groupby(sorted(evidence, key=layer), key=layer))


def summary(evidence: Sequence[NoiseEvidence], sigma: float, step: int) -> RolloutNoise:
    """Return the line of evidence of the rollout of `step`: scheduled sigma, and the noise measured in each layer."""
    changed = sum(item.share_changed * item.elements for item in evidence)
    elements = sum(item.elements for item in evidence)
    return RolloutNoise(
        step=step,
        sigma=sigma,
        weights=len(evidence),
        elements=elements,
        share_changed=changed / elements if elements else 0.0,
        swallowed=sum(item.swallowed for item in evidence),
        layers=by_layer(evidence),
    )


def require_drawn(evidence: Sequence[NoiseEvidence], sigma: float) -> None:
    """Raise CheckFailed when a rollout at `sigma` drew no noise, or noise of another size.

    Noise that the weights' dtype swallowed was drawn all the same: `require_noise` checks that weights changed.
    """
    if sigma > 0 and not any(item.drawn > 0 for item in evidence):
        raise CheckFailed(f"the schedule asked for noise of {sigma:g}, but no weight was given any")
    noisy = [item for item in evidence if item.sigma > 0]
    for item in noisy:
        _require_size(item.name, item.drawn / item.sigma, item.elements)
    if noisy:
        elements = sum(item.elements for item in noisy)
        square = sum((item.drawn / item.sigma) ** 2 * item.elements for item in noisy) / elements
        _require_size("all weights together", math.sqrt(square), elements)


def _require_size(name: str, ratio: float, elements: int) -> None:
    """Raise CheckFailed for a standard deviation that is off by seven of its standard errors, 1 / sqrt(2n) each."""
    if not abs(ratio - 1) <= _DEVIATIONS / math.sqrt(2 * elements) or ratio <= 0:
        raise CheckFailed(f"{name}: noise of {ratio:.3g} times the size that was asked for was drawn")


def require_noise(noise: Noise, rollouts: Sequence[Sequence[NoiseEvidence]]) -> None:
    """Raise CheckFailed when a run under noise changed no weight in any rollout, or a control arm changed one."""
    changed = any(item.share_changed > 0 for rollout in rollouts for item in rollout)
    if noise.control == "sigma_zero" and changed:
        raise CheckFailed("the sigma_zero control changed weights: it is not a control")
    if noise.control != "sigma_zero" and not changed:
        raise CheckFailed(
            f"the spec asks for noise ({noise.schedule.kind}), but no weight changed in "
            f"{counted(len(rollouts), 'rollout')}; sigma stayed 0 (too few steps for the silent stage?) or the weights'"
            " dtype swallowed it (precision: float32 keeps it)"
        )


def _pool(items: list[NoiseEvidence]) -> LayerNoise:
    elements = sum(item.elements for item in items)

    def root(name: str) -> float:
        return math.sqrt(sum(getattr(item, name) * getattr(item, name) * item.elements for item in items) / elements)

    return LayerNoise(
        layer=items[0].layer,
        sigma=root("sigma"),
        drawn=root("drawn"),
        realised=root("realised"),
        share_changed=sum(item.share_changed * item.elements for item in items) / elements,
        swallowed=sum(item.swallowed for item in items),
        elements=elements,
    )
