"""From features to a verdict: which layer is computed wrongly, and by which kind of fault."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeVar

from fp4rl.diagnose.dynamics import Dynamics
from fp4rl.diagnose.probes import Probe

T = TypeVar("T")
FaultKind = Literal["non-determinism", "dead zone", "stuck channel", "saturation", "spikes", "bias", "gain"]

# Feature, the kind of fault that it shows, and the smallest spread that counts (rounding and sampling error are below).
# Checked in this order, since a fault also shifts features further down (a dead zone makes responses jump).
_SIGNS: tuple[tuple[str, FaultKind, float], ...] = (
    ("instability", "non-determinism", 1e-4),
    ("dead", "dead zone", 1e-3),
    ("stuck", "stuck channel", 5e-4),
    ("edge", "saturation", 1e-5),
    ("jumps", "spikes", 5e-5),
    ("kurtosis", "spikes", 0.2),
    ("offset", "bias", 1e-3),
    ("strange_gain", "gain", 0.04),
)
LIMIT = 6.0  # robust z-score above which a feature stands out


@dataclass(frozen=True)
class Suspect:
    """One linear layer that is computed wrongly: the feature that shows it, its value and its robust z-score."""

    site: str
    layer: int | None
    kind: FaultKind
    feature: str
    value: float
    z: float


@dataclass(frozen=True)
class Verdict:
    """Suspects, the worst first. Features wrong `everywhere` point to the device, or to quantization left on."""

    suspects: tuple[Suspect, ...]
    everywhere: tuple[str, ...]

    @property
    def layer(self) -> int | None:
        """The layer with the most evidence, None when nothing is suspect."""
        return self._winner(lambda suspect: suspect.layer)

    @property
    def kind(self) -> str | None:
        """The kind of fault with the most evidence, in that layer."""
        in_layer = [suspect for suspect in self.suspects if suspect.layer == self.layer]
        return Verdict(tuple(in_layer), ())._winner(lambda suspect: suspect.kind)

    def _winner(self, key: Callable[[Suspect], T]) -> T | None:
        votes: dict[T, float] = {}
        for suspect in self.suspects:
            votes[key(suspect)] = votes.get(key(suspect), 0.0) + min(suspect.z, 100.0)
        return max(votes, key=lambda vote: votes[vote]) if votes else None


def suspects(dynamics: Dynamics, limit: float = LIMIT) -> Verdict:
    """Find layers with features beyond `limit` in robust z-scores over all probed sites, and name the faults."""
    values = {feature: {name: _feature(p, feature) for name, p in dynamics.sites.items()} for feature, _, _ in _SIGNS}
    scores = {feature: robust_z(values[feature], spread) for feature, _, spread in _SIGNS}
    named = []
    for name in dynamics.sites:
        sign = next(((f, kind) for f, kind, _ in _SIGNS if scores[f][name] > limit), None)
        if sign is not None:
            (feature, kind), layer = sign, dynamics.site_layers[name]
            named.append(Suspect(name, layer, kind, feature, values[feature][name], scores[feature][name]))
    everywhere = [f for f, _, spread in _SIGNS if values[f] and median(values[f].values()) > limit * spread]
    return Verdict(tuple(sorted(named, key=lambda s: -s.z)), tuple(everywhere))


def robust_z(values: dict[str, float], least_spread: float) -> dict[str, float]:
    """Return (value - median) / (1.4826 * median absolute deviation), the denominator at least `least_spread`."""
    if not values:
        return {}
    middle = median(values.values())
    spread = max(1.4826 * median(abs(v - middle) for v in values.values()), least_spread)
    return {name: (value - middle) / spread for name, value in values.items()}


def _feature(answers: Probe, name: str) -> float:
    if name == "strange_gain":
        return abs(answers.gain - 1)
    return float(getattr(answers, name))
