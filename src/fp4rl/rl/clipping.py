"""Learned clipping in a run: which weights are clamped, what is logged of it, and that it was learned."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import Attachment
from fp4rl.rl.clamp import Clamp
from fp4rl.rl.masters import Masters
from fp4rl.rl.oscillation import watched_weights
from fp4rl.spec.clipping import Clipped
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment


def masters_of(model: nn.Module, attachment: Attachment | None, experiment: Experiment) -> Masters | None:
    """Return the masters of a run's model, with a clamp for each trained weight that is rounded where the recipe has
    learned clipping; None where the optimizer updates the model's own weights. InvalidValueError where none would be
    clamped."""
    settings = experiment.training.learned_clipping
    if settings is None or attachment is None:
        return Masters.of(model) if experiment.model.master_dtype == "float32" else None
    watched = watched_weights(attachment, None)
    clamps = {name: Clamp(each.state, each.weight, settings.init) for name, each in watched.items()}
    if not clamps:
        raise InvalidValueError(
            "training.learned_clipping: no weight of this model is both trained and rounded, so that nothing would be "
            "clamped; leave it out"
        )
    return Masters(model, clamps, settings.lr)


def unclamped(masters: Masters | None) -> Mapping[str, Tensor]:
    """Return what is updated in place of each clamped weight."""
    copies = masters.copies() if masters is not None and masters.clamps else {}
    return {name: master for name, master in copies.items() if masters is not None and name in masters.clamps}


@torch.no_grad()
def clipping_rows(masters: Masters | None) -> Iterator[Clipped]:
    """Yield what clamps do at present, a row for each layer; none where there are none."""
    pairs = [(masters.clamps[name], master) for name, master in unclamped(masters).items()] if masters else []
    pairs.sort(key=lambda pair: -1 if pair[0].layer is None else pair[0].layer)
    for layer, group in groupby(pairs, key=lambda pair: pair[0].layer):
        own = list(group)
        bounds = torch.cat([clamp.strength.sigmoid().flatten() for clamp, _ in own])
        weights = sum(master.numel() for _, master in own)
        yield Clipped(
            layer=layer,
            weights=weights,
            blocks=bounds.numel(),
            clipped=sum(int((clamp(master) != master).sum()) for clamp, master in own) / weights,
            learned=sum(int((clamp.strength != clamp.init).sum()) for clamp, _ in own) / bounds.numel(),
            mean=float(bounds.mean()),
            least=float(bounds.min()),
            largest=float(bounds.max()),
        )


def clipping_figures(masters: Masters | None) -> dict[str, float]:
    """Return the metrics of an update: the share of weights that are clamped, and the mean factor of block maxima."""
    rows = list(clipping_rows(masters))
    if not rows:
        return {}
    weights, blocks = sum(row.weights for row in rows), sum(row.blocks for row in rows)
    return {
        "weights/clipped": sum(row.clipped * row.weights for row in rows) / weights,
        "weights/clip_bound": sum(row.mean * row.blocks for row in rows) / blocks,
    }


def require_learned(rows: Sequence[Clipped]) -> None:
    """Raise CheckFailed for clamps whose strengths training left as they began."""
    if rows and not any(row.learned for row in rows):
        raise CheckFailed(
            f"training.learned_clipping: no strength of {sum(row.blocks for row in rows)} blocks moved, so nothing was "
            "learned of it; raise training.learned_clipping.lr"
        )
