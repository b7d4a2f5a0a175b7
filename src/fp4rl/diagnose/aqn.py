"""From how much each layer suffers to noise multipliers, by named rules; two of them are there as controls."""

from collections.abc import Mapping
from math import sqrt
from typing import get_args

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.noise import Factor, Multipliers, Zones
from fp4rl.spec.scan import NoiseRule

RULES: tuple[str, ...] = get_args(NoiseRule)
LEAST, MOST = 0.25, 4.0  # bounds of a multiplier, so that one layer cannot take all the noise


def noise_multipliers(rule: NoiseRule, severity: Mapping[int, float], standing_out: frozenset[int]) -> Multipliers:
    """Return the multipliers of every layer from `severity`, layer -> KL or error, and those `standing_out`.

    global        1 everywhere, the final norm included
    targeted      1 on the layers that stand out (the worst fifth when none does), 0 elsewhere
    healthy_only  the control: exactly the other layers
    proportional  grows with the square root of the severity; root mean square 1
    inverse       falls with it; root mean square 1
    zones         one value for the layers at both ends and one for the middle, by their mean severity
    """
    if rule not in RULES:
        raise NotFoundError(f"no noise rule is called {rule!r}{nearest(rule, RULES)}")
    if rule == "global":
        return Multipliers()
    if not severity:
        raise InvalidValueError("no layer was measured, so no multiplier can be advised; scan precision or sensitivity")
    if rule in ("targeted", "healthy_only"):
        ranked = sorted(severity, key=lambda layer: -severity[layer])
        chosen = standing_out & set(severity) or set(ranked[: max(1, len(ranked) // 5)])
        wanted = chosen if rule == "targeted" else set(severity) - chosen
        return Multipliers(by_layer=tuple((layer, float(layer in wanted)) for layer in sorted(severity)), others=0.0)
    if rule == "zones":
        return Multipliers(zones=_zones(severity))
    power = 0.5 if rule == "proportional" else -0.5
    return Multipliers(by_layer=tuple(sorted(_scaled(severity, power).items())))


def _scaled(severity: Mapping[int, float], power: float) -> dict[int, float]:
    """Severity ** power, bounded, with root mean square 1 before the bounds."""
    floor = max(max(severity.values()) * 1e-6, 1e-300)
    raw = {layer: max(value, floor) ** power for layer, value in severity.items()}
    scale = sqrt(sum(value * value for value in raw.values()) / len(raw))
    return {layer: round(min(MOST, max(LEAST, value / scale)), 4) for layer, value in raw.items()}


def _zones(severity: Mapping[int, float]) -> Zones:
    share = Zones().edge_share
    layers = sorted(severity)
    width = max(1, int(share * len(layers)))
    edge = [severity[layer] for layer in layers[:width] + layers[-width:]]
    middle = [severity[layer] for layer in layers[width:-width]] or edge
    means = {0: sum(edge) / len(edge), 1: sum(middle) / len(middle)}
    factors = _scaled(means, 0.5) if max(means.values()) > 0 else {0: 1.0, 1: 1.0}
    return Zones(edge_share=share, edge=Factor(value=factors[0]), middle=Factor(value=factors[1]))
