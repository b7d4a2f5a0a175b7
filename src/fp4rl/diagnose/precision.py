"""The precision of every site in its format, weights and inputs separately, each beside that of ideal data."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.experts import ExpertError, OwnProduct, unpadded, watching
from fp4rl.diagnose.passes import Progress, logits_of, tracked
from fp4rl.inject.adapted import AdaptedSum, adapter_of
from fp4rl.inject.experts import ExpertProduct
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import names_in_memory, skeleton
from fp4rl.models.packed.folder import checkpoint_tensors
from fp4rl.models.packed.weight import Stored
from fp4rl.models.site_tensors import tensors_of
from fp4rl.numerics.errors import ErrorSums, Rounded, gaussian_ideal, pooled, round_piece
from fp4rl.sites.observe import observe
from fp4rl.sites.walk import as_used
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection

Part = Literal["weight", "input"]
Rows = Callable[[int], Iterator[Tensor]]  # pieces [at most n rows, columns] of one tensor, from its start

PIECE = 1 << 20  # values held at once


@dataclass(frozen=True)
class PartError:
    """One site's weight or matmul input: its measures (see `ErrorSums.measures`) and those of ideal Gaussian data.

    `short_block` is the length of the last block where the format's block does not divide the width, else 0. Of stacked
    experts the measures are of all together, and `experts` tells them apart.
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
    experts: tuple[ExpertError, ...] = ()
    own_factor: float | None = None  # relative_l2 under a factor of its own, where it shares that of a fused group

    @property
    def excess(self) -> float:
        """relative_l2 over that of ideal Gaussian data in the same format: at 1 the format itself is the limit."""
        return self._excess(self.measures["relative_l2"])

    @property
    def worst_expert(self) -> float:
        """The same of the expert whose weight has the greatest error; 0 where there are none."""
        return max((self._excess(e.relative_l2) for e in self.experts if e.tokens is None), default=0.0)

    def _excess(self, error: float) -> float:
        floor = self.ideal["relative_l2"]
        return error / floor if floor > 0 else (1.0 if error == 0 else inf)


def weight_errors(
    model: nn.Module, table: SiteTable, on_progress: Progress | None = None
) -> tuple[tuple[PartError, ...], dict[str, ErrorSums]]:
    """Measure every weight that the table rounds, and return the sums behind it; NotFinite for NaN and Inf."""

    def matrices_of(plan: SitePlan) -> list[Rows]:
        return [_pieces(weight) for weight in weights_of(model, plan)]

    return _weight_errors(matrices_of, table, on_progress)


def stored_weight_errors(
    folder: str | Path, injection: Injection, on_progress: Progress | None = None
) -> tuple[SiteTable, tuple[PartError, ...], dict[str, ErrorSums]]:
    """Measure the weights of a checkpoint folder from its files; the model is never loaded and need not fit in memory.

    Raises InvalidValueError for an adapter's folder, NotFoundError for a tensor that the files do not hold.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise InvalidValueError(f"{folder}: an adapter; scan it without weights_only, or scan its base model")
    model, stored = skeleton(folder), checkpoint_tensors(folder)
    table, names = resolve(model, injection), names_in_memory(model, stored)
    stored = {names[name]: tensor for name, tensor in stored.items()}
    return table, *_weight_errors(lambda plan: _stored_rows(plan, stored, folder), table, on_progress)


def _weight_errors(
    matrices_of: Callable[[SitePlan], list[Rows]], table: SiteTable, on_progress: Progress | None
) -> tuple[tuple[PartError, ...], dict[str, ErrorSums]]:
    """Return a row for each site, with the sums of its matrices: every expert is rounded as a tensor of its own."""
    sums, parts = dict[str, ErrorSums](), list[PartError]()
    plans = [plan for plan in table.plans if plan.weight is not None]
    shared = _shared_magnitudes(matrices_of, plans, getattr(torch, table.injection.dtype))
    for plan in tracked(plans, on_progress):
        each = [rounding_error(rows, plan, table, shared.get(plan.name)) for rows in matrices_of(plan)]
        sums[plan.name] = pooled(own for own, _ in each)
        experts = [ExpertError.of(e, *own) for e, own in enumerate(each)] if plan.site.kind == "experts" else ()
        part = part_error(plan, "weight", sums[plan.name], experts)
        if plan.name in shared:
            own = pooled(rounding_error(rows, plan, table)[0] for rows in matrices_of(plan))
            part = replace(part, own_factor=own.measures()["relative_l2"])
        parts.append(part)
    return tuple(parts), sums


def _shared_magnitudes(
    matrices_of: Callable[[SitePlan], list[Rows]], plans: Sequence[SitePlan], dtype: torch.dtype
) -> dict[str, float]:
    """Return the largest magnitude of its group for each site that shares a factor with others."""
    groups: dict[object, list[SitePlan]] = defaultdict(list)
    for plan in plans:
        if plan.weight is not None and plan.weight.factor == "fused" and plan.site.kind == "linear":
            groups[plan.site.fused_group or plan.name, plan.weight].append(plan)
    shared = dict[str, float]()
    for group in groups.values():
        if len(group) > 1:
            largest = max(_largest(rows, plan, dtype) for plan in group for rows in matrices_of(plan))
            shared |= {plan.name: largest for plan in group}
    return shared


def _largest(rows: Rows, plan: SitePlan, dtype: torch.dtype) -> float:
    return max(float(piece.to(dtype).abs().max()) for piece in rows(_height(plan)))


def _height(plan: SitePlan) -> int:
    return max(32, PIECE // max(plan.site.shape[-1], 1) // 32 * 32)  # whole tiles of a 32 x 32 format


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
    rounded = [plan for plan in table.plans if plan.input is not None]
    plans = {path: plan for plan in rounded if plan.site.kind == "linear" for path in plan.site.places}
    stacks = [plan for plan in rounded if plan.site.kind == "experts"]
    tallies: dict[str, ErrorSums] = defaultdict(ErrorSums)
    routed: dict[str, dict[int, _Routed]] = defaultdict(lambda: defaultdict(_Routed))
    dtype = getattr(torch, table.injection.dtype)
    last: dict[str, Any] = {}

    def watch(path: str, tokens: Tensor) -> None:
        fmt = plans[path].input
        assert fmt is not None
        if last.get("tokens") is not tokens or last.get("fmt") != fmt:  # q, k and v read one tensor
            sums = ErrorSums()
            sums.add(round_piece(tokens.to(dtype), fmt, plans[path].name), each_row=True)
            last.update(tokens=tokens, fmt=fmt, tally=sums)
        tallies[plans[path].name].merge(last["tally"])

    def watch_experts(plan: SitePlan, product: ExpertProduct, parts: list[OwnProduct]) -> Tensor:
        assert plan.input is not None
        for expert, _, x, _ in parts:
            tokens = x.detach().flatten(0, -2)
            real = tokens[tokens.any(-1)]  # Llama-4 gives each expert every token, and zeros for those of others
            if len(real):
                routed[plan.name][expert].add(round_piece(real.to(dtype), plan.input, f"{plan.name}, expert {expert}"))
        return product.compute(product.x, product.weight)

    for batch in tracked(calibration.batches, on_progress) if rounded else ():
        for part in unpadded(batch) if stacks else (batch,):
            with observe(model, plans, on_input=watch) as eye, watching(model, stacks, watch_experts):
                eye.mask = part.mask
                logits_of(model, part)
                last.clear()
    for name, experts in routed.items():
        tallies[name] = pooled(own.sums for own in experts.values())
    return tuple(
        part_error(plan, "input", tallies[plan.name], [own.error(e) for e, own in sorted(routed[plan.name].items())])
        for plan in rounded
        if tallies[plan.name].values
    )


@dataclass
class _Routed:
    """What one expert was given so far."""

    sums: ErrorSums = field(default_factory=ErrorSums)
    largest: float = 0.0
    tokens: int = 0

    def add(self, rows: Rounded) -> None:
        self.sums.add(rows, each_row=True)
        self.largest, self.tokens = max(self.largest, rows.largest), self.tokens + len(rows.values)

    def error(self, expert: int) -> ExpertError:
        return ExpertError.of(expert, self.sums, self.largest, self.tokens)


def part_error(plan: SitePlan, part: Part, tally: ErrorSums, experts: Sequence[ExpertError] = ()) -> PartError:
    """Return the measures of sums, with the ideal beside them."""
    fmt = plan.weight if part == "weight" else plan.input
    assert fmt is not None
    site, columns = plan.site, plan.site.shape[-1]
    short = columns % fmt.block[1] if fmt.block is not None else 0
    ideal = ideal_measures(fmt)
    measures, each = tally.measures(), tuple(experts)
    return PartError(site.name, site.layer, site.role, part, fmt.name, site.shape, short, measures, ideal, each)


def rounding_error(
    rows: Rows, plan: SitePlan, table: SiteTable, shared: float | None = None
) -> tuple[ErrorSums, float]:
    """Sum up the errors of one weight given in pieces, in the dtype that is quantized; also its largest magnitude.

    `shared` is the largest magnitude of the group that it shares a factor with.
    """
    fmt, dtype = plan.weight, getattr(torch, table.injection.dtype)
    assert fmt is not None
    spans_tensor = fmt.scale in ("e4m3", "fp32")  # one scale serves it whole (NVFP4's second level, FP8)
    amax = shared or (_largest(rows, plan, dtype) if spans_tensor else None)
    tally, largest = ErrorSums(), 0.0
    for piece in rows(_height(plan)):
        rounded = round_piece(piece.to(dtype), fmt, plan.name, amax)
        largest = max(largest, rounded.largest)
        tally.add(rounded)
    return tally, largest


def ideal_measures(fmt: Format) -> dict[str, float]:
    """Return the measures of ideal Gaussian data; in long rows the median row's error is that of all."""
    ideal = gaussian_ideal(fmt)
    return {**ideal, "row_median": ideal["relative_l2"]}


def _stored_rows(plan: SitePlan, stored: dict[str, Stored], folder: str | Path) -> list[Rows]:
    """The matrices [out, in] of a site as its files hold them: experts lie in one tensor, or each in its own."""
    experts, site = plan.site.kind == "experts", plan.site
    tensors = tensors_of(site, stored, folder)
    own = tensors[0][0]
    if experts and len(own.shape) < 3:
        return [_joined(matrix) for matrix in tensors]
    if not experts and not site.transposed:
        return [own.rows]
    if site.transposed is None:
        raise InvalidValueError(
            f"{folder}: nothing tells how the square {own.name} is stored; scan without weights_only"
        )
    whole = as_used(site, own.read())
    return [_pieces(weight) for weight in (whole.unbind(0) if experts else [whole])]


def _joined(tensors: tuple[Stored, ...]) -> Rows:
    return lambda height: (piece for tensor in tensors for piece in tensor.rows(height))
