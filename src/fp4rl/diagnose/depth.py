"""How the error of the residual stream grows from layer to layer, and the parts of weights and activations in it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import hypot, inf, log10

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.passes import Progress, logits_of, tracked
from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SiteTable
from fp4rl.sites.observe import OnTensor, observe
from fp4rl.spec.errors import InvalidValueError

PARTS = ("weights", "inputs", "both")


@dataclass(frozen=True)
class LayerDepth:
    """The residual stream after one layer: its root mean square, and its errors relative to that.

    `weights` and `inputs` are measured with only that part rounded (`inputs` includes rounded outputs), `both` with the
    whole table; `predicted` is the error if both were independent, sqrt(weights^2 + inputs^2).
    """

    layer: int
    rms: float
    weights: float
    inputs: float
    both: float

    @property
    def predicted(self) -> float:
        """The error if the two parts were independent."""
        return hypot(self.weights, self.inputs)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-error ratio of the whole table, in decibels."""
        return -20 * log10(self.both) if self.both > 0 else inf


def depth(
    model: nn.Module, table: SiteTable, calibration: Calibration, *, on_progress: Progress | None = None
) -> tuple[LayerDepth, ...]:
    """Measure the error of the residual stream after every layer: one unchanged pass and up to three injected ones per
    batch. Memory holds the unchanged stream of one batch at a time.

    Raises InvalidValueError when no site belongs to a numbered layer.
    """
    layers = layer_paths(table)
    tables = {part: _part(table, part) for part in PARTS}
    power = dict.fromkeys(layers, 0.0)
    errors = {part: dict.fromkeys(layers, 0.0) for part in PARTS}
    counts = dict.fromkeys(layers, 0)
    for batch in tracked(calibration.batches, on_progress):
        clean = _stream(model, layers, batch)
        for name, tokens in clean.items():
            power[name] += float(tokens.double().square().sum())
            counts[name] += tokens.numel()
        for part, injected in tables.items():
            _add_errors(model, injected, batch, clean, errors[part])
    rms = {path: (power[path] / counts[path]) ** 0.5 for path in layers if counts[path]}
    relative = {path: [(errors[part][path] / power[path]) ** 0.5 for part in PARTS] for path in rms}
    return tuple(LayerDepth(layers[path], rms[path], *relative[path]) for path in rms)


def layer_paths(table: SiteTable) -> dict[str, int]:
    """Return path -> number of each decoder layer that holds a site, in order."""
    paths: dict[str, int] = {}
    for site in (*(plan.site for plan in table.plans), *(left.site for left in table.left_out)):
        parts = site.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if site.layer is not None and at is not None:
            paths[".".join(parts[: at + 1])] = site.layer
    if not paths:
        raise InvalidValueError("the model has no numbered layers (such as model.layers.0), so no depth to follow")
    return dict(sorted(paths.items(), key=lambda item: item[1]))


def _add_errors(
    model: nn.Module, table: SiteTable, batch: Batch, clean: dict[str, Tensor], sums: dict[str, float]
) -> None:
    if not table.plans:
        return

    def watch(name: str, tokens: Tensor) -> None:
        sums[name] += float((tokens.float() - clean[name]).double().square().sum())

    with attach(model, table) as attachment:
        attachment.set_phase("evaluation")
        _run(model, clean, batch, watch)


def _stream(model: nn.Module, paths: Iterable[str], batch: Batch) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    _run(model, paths, batch, lambda name, tokens: kept.update({name: tokens.float().clone()}))
    return kept


def _run(model: nn.Module, paths: Iterable[str], batch: Batch, watch: OnTensor) -> None:
    with observe(model, paths, on_output=watch) as eye, torch.no_grad():
        eye.mask = batch.mask
        logits_of(model, batch)


def _part(table: SiteTable, part: str) -> SiteTable:
    """Return the table with weights alone or inputs alone, without sites that then do nothing."""
    if part == "both":
        return table
    if part == "weights":
        plans = [replace(plan, input=None, output=None) for plan in table.plans]
    else:
        plans = [replace(plan, weight=None) for plan in table.plans]
    return replace(table, plans=tuple(plan for plan in plans if plan.points()))
