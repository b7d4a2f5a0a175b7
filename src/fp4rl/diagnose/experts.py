"""Stacked experts one by one: what each is given in an unchanged forward, its error, and which is unlike the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Batch
from fp4rl.inject.experts import ExpertProduct, Products
from fp4rl.inject.plan import SitePlan
from fp4rl.numerics.errors import ErrorSums

UNLIKE = 4.0  # times the largest magnitude of the median expert of a stack, or a part of it
ENOUGH_TOKENS = 8  # that an expert's inputs are judged by
OnRows = Callable[[SitePlan, int, Tensor], None]  # plan, expert, the rows [n, in] that it multiplies


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


class _Looked:
    """Takes the place of an injected stack: computes each product unchanged, and reports the rows of each expert."""

    def __init__(self, plan: SitePlan, stored: Tensor, on_rows: OnRows) -> None:
        self.plan, self.stored, self.on_rows = plan, stored, on_rows

    def summed_over(self, transposed: bool) -> None:
        """Rows are looked at, and they run along `in` either way."""

    def computed(self, product: ExpertProduct) -> Tensor:
        """Return the product, unchanged."""
        for expert, rows in self._rows(product):
            if rows.numel():
                self.on_rows(self.plan, expert, rows.detach().flatten(0, -2))
        return product.compute(product.x, product.weight)

    def _rows(self, product: ExpertProduct) -> list[tuple[int, Tensor]]:
        """Return (expert, rows). A matrix tells its expert by its place in the stack; a gathered copy has none."""
        x, weight, stored = product.x, product.weight, self.stored
        if product.ends is not None:
            return list(enumerate(x.tensor_split(product.ends.tolist())[:-1]))
        if weight.ndim == 3:
            return list(enumerate(x)) if weight.data_ptr() == stored.data_ptr() else []
        expert, rest = divmod(weight.data_ptr() - stored.data_ptr(), stored.stride(0) * stored.element_size())
        return [(expert, x)] if rest == 0 and 0 <= expert < len(stored) else []


@contextmanager
def watching(model: nn.Module, plans: Sequence[SitePlan], on_rows: OnRows) -> Iterator[None]:
    """Give `on_rows` the rows of every expert of these stacks, at each of their products."""
    with Products() as products:
        for plan in plans:
            stored = model.get_submodule(plan.site.path).get_parameter(str(plan.site.parameter))
            looked: Any = _Looked(plan, stored, on_rows)
            products.follow(stored, looked)
        yield
