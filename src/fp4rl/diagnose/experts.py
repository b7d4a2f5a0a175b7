"""Stacked experts one by one: what each is given in an unchanged forward, its error, and which is unlike the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Batch
from fp4rl.inject.experts import ExpertProduct, Products
from fp4rl.inject.plan import SitePlan
from fp4rl.numerics.errors import ErrorSums

UNLIKE = 4.0  # times the largest magnitude of the median expert of a stack, or a part of it
ENOUGH_TOKENS = 8  # that an expert's inputs are judged by


class OwnProduct(NamedTuple):
    """The part of an intercepted product that is one expert's: y[at] = x [n, in] times its weight [out, in]."""

    expert: int
    at: slice | int
    x: Tensor
    weight: Tensor


# Returns the result of a product that has these parts; a part may have no rows.
OnProduct = Callable[[SitePlan, ExpertProduct, list[OwnProduct]], Tensor]


@dataclass(frozen=True)
class ExpertError:
    """One expert's weight, or its inputs with the `tokens` routed to it: the largest magnitude, and errors as in
    `ErrorSums.measures`."""

    expert: int
    largest: float
    relative_l2: float
    deadzone_share: float
    tokens: int | None = None

    @classmethod
    def of(cls, expert: int, sums: ErrorSums, largest: float, tokens: int | None = None) -> "ExpertError":
        """Return what the sums over an expert's values come to."""
        measured = sums.measures()
        return cls(expert, largest, measured["relative_l2"], measured["deadzone_share"], tokens)


def unlike(experts: Sequence[ExpertError]) -> list[tuple[ExpertError, float]]:
    """Return the experts whose largest magnitude is far from the stack's median, and how many times that it is."""
    judged = [e for e in experts if e.tokens is None or e.tokens >= ENOUGH_TOKENS]
    usual = median(e.largest for e in judged) if judged else 0.0
    times = [(e, e.largest / usual) for e in judged if usual > 0]
    return [(e, ratio) for e, ratio in times if not 1 / UNLIKE <= ratio <= UNLIKE]


def unpadded(batch: Batch) -> Iterator[Batch]:
    """Yield the texts of a batch, those of one length together: routers send padding to experts like any token."""
    lengths = batch.mask.sum(-1)
    for length in sorted(set(lengths.tolist())):
        rows = lengths == length
        real = batch.mask[rows].bool()
        ids, answers = (part[rows][real].view(-1, length) for part in (batch.ids, batch.answers))
        yield Batch(ids, torch.ones_like(ids), answers)


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """Yield every text of a batch by itself, without padding: rows of an expert do not tell their text."""
    for part in unpadded(batch):
        each = (torch.split(tensor, 1) for tensor in (part.ids, part.mask, part.answers))
        yield from (Batch(*rows) for rows in zip(*each, strict=True))


class _Looked:
    """Takes the place of an injected stack: hands each product on, with the parts that are one expert's."""

    def __init__(self, plan: SitePlan, stored: Tensor, on_product: OnProduct) -> None:
        self.plan, self.stored, self.on_product = plan, stored, on_product

    def summed_over(self, transposed: bool) -> None:
        """Rows are looked at, and they run along `in` either way."""

    def computed(self, product: ExpertProduct) -> Tensor:
        """Return what the product gives."""
        return self.on_product(self.plan, product, [*self._parts(product)])

    def _parts(self, product: ExpertProduct) -> Iterator[OwnProduct]:
        """Yield each expert's own part. A matrix tells its expert by its place in the stack."""
        x, weight, stored = product.x, product.weight, self.stored
        if product.ends is not None:
            ends = product.ends.tolist()
            for expert, at in enumerate(map(slice, [0, *ends], ends)):
                yield OwnProduct(expert, at, x[at], weight[expert])
        elif weight.ndim == 3:
            if weight.data_ptr() == stored.data_ptr():
                yield from (OwnProduct(expert, expert, x[expert], weight[expert]) for expert in range(len(stored)))
        else:
            expert, rest = divmod(weight.data_ptr() - stored.data_ptr(), stored.stride(0) * stored.element_size())
            if rest == 0 and 0 <= expert < len(stored):
                yield OwnProduct(expert, slice(None), x, weight)


@contextmanager
def watching(model: nn.Module, plans: Sequence[SitePlan], on_product: OnProduct) -> Iterator[None]:
    """Let `on_product` compute every product of these stacks.

    Meanwhile `batched_mm`, which gathers a copy of a weight for every row and so tells no experts apart, is `eager`.
    """
    with Products() as products, _telling_apart([model.get_submodule(plan.site.path) for plan in plans]):
        for plan in plans:
            stored = model.get_submodule(plan.site.path).get_parameter(str(plan.site.parameter))
            looked: Any = _Looked(plan, stored, on_product)
            products.follow(stored, looked)
        yield


@contextmanager
def _telling_apart(modules: Sequence[nn.Module]) -> Iterator[None]:
    configs = [config for module in modules if (config := getattr(module, "config", None)) is not None]
    gathering: list[Any] = [c for c in configs if getattr(c, "_experts_implementation", None) == "batched_mm"]
    for config in gathering:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config in gathering:
            config._experts_implementation = "batched_mm"
