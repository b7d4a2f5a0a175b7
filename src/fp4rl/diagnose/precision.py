"""The precision of every site in its format, weights and inputs separately, each beside that of ideal data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.passes import Progress, logits_of, tracked
from fp4rl.diagnose.shards import StoredTensor, stored_tensors
from fp4rl.inject.adapted import AdaptedSum, adapter_of
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import skeleton
from fp4rl.numerics.errors import ErrorSums, gaussian_ideal, pooled, round_piece
from fp4rl.sites.observe import observe
from fp4rl.sites.walk import as_used
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection

Part = Literal["weight", "input"]
Rows = Callable[[int], Iterator[Tensor]]  # pieces [at most n rows, columns] of one tensor, from its start

PIECE = 1 << 20  # values held at once


@dataclass(frozen=True)
class PartError:
    """One site's weight or matmul input: its measures (see `ErrorSums.measures`) and those of ideal Gaussian data.

    `short_block` is the length of the last block where the format's block does not divide the width, else 0.
    """

    site: str
    layer: int | None
    role: str
    part: Part
    format: str
    shape: tuple[int, ...]
    short_block: int
    measures: Mapping[str, float]
    ideal: Mapping[str, float]

    @property
    def excess(self) -> float:
        """relative_l2 over that of ideal Gaussian data in the same format: at 1 the format itself is the limit."""
        error, floor = self.measures["relative_l2"], self.ideal["relative_l2"]
        return error / floor if floor > 0 else (1.0 if error == 0 else inf)


def weight_errors(
    model: nn.Module, table: SiteTable, on_progress: Progress | None = None
) -> tuple[tuple[PartError, ...], dict[str, ErrorSums]]:
    """Measure every weight that the table rounds, and return the sums behind it; NotFinite for NaN and Inf."""
    plans = [plan for plan in table.plans if plan.weight is not None]

    def matrices_of(plan: SitePlan) -> list[Rows]:
        return [_pieces(weight) for weight in weights_of(model, plan)]

    return _weight_errors(matrices_of, plans, table, on_progress)


def stored_weight_errors(
    folder: str | Path, injection: Injection, on_progress: Progress | None = None
) -> tuple[SiteTable, tuple[PartError, ...], dict[str, ErrorSums]]:
    """Measure the weights of a checkpoint folder from its files; the model is never loaded and need not fit in memory.

    Stacked experts are left out, since files name and stack them in many ways. Raises InvalidValueError for an
    adapter's folder, NotFoundError for a tensor that is not in the files.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise InvalidValueError(f"{folder}: an adapter; scan it without weights_only, or scan its base model")
    table, stored = resolve(skeleton(folder), injection), stored_tensors(folder)
    plans = [plan for plan in table.plans if plan.weight is not None and plan.site.kind == "linear"]
    return table, *_weight_errors(lambda plan: [_tensor_of(plan, stored, folder).rows], plans, table, on_progress)


def _weight_errors(
    matrices_of: Callable[[SitePlan], list[Rows]], plans: list[SitePlan], table: SiteTable, on_progress: Progress | None
) -> tuple[tuple[PartError, ...], dict[str, ErrorSums]]:
    """Return a row for each site, with the sums of its matrices: every expert is rounded as a tensor of its own."""
    sums = {
        plan.name: pooled([rounding_error(rows, plan, table) for rows in matrices_of(plan)])
        for plan in tracked(plans, on_progress)
    }
    return tuple(part_error(plan, "weight", sums[plan.name]) for plan in plans), sums


def weights_of(model: nn.Module, plan: SitePlan) -> tuple[Tensor, ...]:
    """Return the matrices [out, in] that are rounded: a layer's own (with merged adapters), or one for each expert."""
    if plan.merged:
        stored = AdaptedSum(adapter_of(model, plan.site)).weight
    else:
        stored = model.get_submodule(plan.site.path).get_parameter(plan.site.parameter or "weight")
    weight = as_used(plan.site, stored.detach())
    return weight.unbind(0) if plan.site.kind == "experts" else (weight,)


def _pieces(weight: Tensor) -> Rows:
    return lambda height: iter(torch.split(weight, height))


def input_errors(
    model: nn.Module, table: SiteTable, calibration: Calibration, on_progress: Progress | None = None
) -> tuple[PartError, ...]:
    """Measure every matmul input that the table rounds; one forward pass per batch serves all sites."""
    plans = {plan.site.path: plan for plan in table.plans if plan.input is not None and plan.site.kind == "linear"}
    if not plans:
        return ()
    tallies = {path: ErrorSums() for path in plans}
    dtype = getattr(torch, table.injection.dtype)
    last: dict[str, Any] = {}

    def watch(path: str, tokens: Tensor) -> None:
        fmt = plans[path].input
        assert fmt is not None
        if last.get("tokens") is not tokens or last.get("fmt") != fmt:  # q, k and v read sums tensor
            sums = ErrorSums()
            sums.add(round_piece(tokens.to(dtype), fmt, plans[path].name), each_row=True)
            last.update(tokens=tokens, fmt=fmt, tally=sums)
        tallies[path].merge(last["tally"])

    with observe(model, plans, on_input=watch) as eye:
        for batch in tracked(calibration.batches, on_progress):
            eye.mask = batch.mask
            logits_of(model, batch)
            last.clear()
    return tuple(part_error(plan, "input", tallies[path]) for path, plan in plans.items() if tallies[path].values)


def part_error(plan: SitePlan, part: Part, tally: ErrorSums) -> PartError:
    """Return the measures of sums, with the ideal beside them."""
    fmt = plan.weight if part == "weight" else plan.input
    assert fmt is not None
    site, columns = plan.site, plan.site.shape[-1]
    short = columns % fmt.block[1] if fmt.block is not None else 0
    ideal = ideal_measures(fmt)
    return PartError(site.name, site.layer, site.role, part, fmt.name, site.shape, short, tally.measures(), ideal)


def rounding_error(rows: Rows, plan: SitePlan, table: SiteTable) -> ErrorSums:
    """Sum up the errors of one weight that is given in pieces, cast to the dtype that the quantizer sees."""
    fmt, dtype = plan.weight, getattr(torch, table.injection.dtype)
    assert fmt is not None
    height = max(32, PIECE // max(plan.site.shape[-1], 1) // 32 * 32)  # whole tiles of a 32 x 32 format
    spans_tensor = fmt.scale in ("e4m3", "fp32")  # one scale serves it whole (NVFP4's second level, FP8)
    amax = max(float(piece.to(dtype).abs().max()) for piece in rows(height)) if spans_tensor else None
    tally = ErrorSums()
    for piece in rows(height):
        tally.add(round_piece(piece.to(dtype), fmt, plan.name, amax))
    return tally


def ideal_measures(fmt: Format) -> dict[str, float]:
    """Return the measures of ideal Gaussian data; in long rows the median row's error is that of all."""
    ideal = gaussian_ideal(fmt)
    return {**ideal, "row_median": ideal["relative_l2"]}


def _tensor_of(plan: SitePlan, stored: dict[str, StoredTensor], folder: str | Path) -> StoredTensor:
    name = f"{plan.name}.weight"
    if name not in stored:
        raise NotFoundError(f"{folder}: no tensor {name!r} in its safetensors files{nearest(name, stored)}")
    if plan.site.transposed:
        raise InvalidValueError(f"{folder}: {name} is stored [in, out], not read in pieces; scan without weights_only")
    shape, said = list(stored[name].shape), list(plan.site.shape)
    if shape != said:
        raise InvalidValueError(f"{folder}: {name} is {shape}, but config.json says {said}")
    return stored[name]
