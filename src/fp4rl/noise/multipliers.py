"""Which factor on sigma a layer has, at a given share of the run."""

import math

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import Factor, Multipliers, Zones


def multiplier_at(multipliers: Multipliers, layer: int | None, layers: int, share: float | None = None) -> float:
    """Factor of `layer` (None outside the stack, such as the final norm) in a model of `layers` layers.

    `share` is the part of the run that is done, 0..1; InvalidValueError when a zone changes during the run and it is
    missing.
    """
    own = dict(multipliers.by_layer)
    if layer is None:
        return multipliers.others
    if layer in own:
        return own[layer]
    if multipliers.zones is None:
        return multipliers.others
    return _factor_at(_zone(multipliers.zones, layer, layers), share)


def require_layers(multipliers: Multipliers, layers: int) -> None:
    """InvalidValueError when a multiplier names a layer that the model does not have: it would never act."""
    beyond = [layer for layer, _ in multipliers.by_layer if layer >= layers]
    if beyond:
        raise InvalidValueError(
            f"multipliers.by_layer names layer {beyond[0]}, but the model's last layer is {layers - 1}; "
            "the multipliers were made for another model"
        )


def _zone(zones: Zones, layer: int, layers: int) -> Factor:
    width = max(1, math.floor(zones.edge_share * layers))
    return zones.edge if layer < width or layer >= layers - width else zones.middle


def _factor_at(factor: Factor, share: float | None) -> float:
    if factor.changes_at is None or factor.later is None:
        return factor.value
    if share is None:
        raise InvalidValueError(
            "a zone's factor changes during the run: pass `share`, the part of the run that is done"
        )
    return factor.later if share >= factor.changes_at else factor.value
