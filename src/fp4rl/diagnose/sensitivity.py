"""What each site's error does to the output, measured by rounding one site at a time; size alone does not tell."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.estimate import estimated_kl
from fp4rl.diagnose.passes import Harm, Progress, harm_of, reference_of, weighted
from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.spec.errors import InvalidValueError


@dataclass(frozen=True)
class SiteHarm:
    """One site: `alone` rounded and nothing else, what is saved when it is `spared` while all others are rounded, and
    the KL that one backward pass predicts for `alone` (nats per token; None for what is no linear layer)."""

    name: str
    layer: int | None
    role: str
    alone: Harm | None
    spared: Harm | None
    estimate: float | None

    @property
    def harm(self) -> float:
        """KL of this site alone: measured where it was, estimated otherwise; never below 0."""
        return max(0.0, self.alone.kl if self.alone is not None else self.estimate or 0.0)


@dataclass(frozen=True)
class Sensitivity:
    """`everything` is the harm of the whole table; `rank_correlation` compares estimate and `alone` (Spearman)."""

    everything: Harm
    sites: tuple[SiteHarm, ...]
    rank_correlation: float | None


def sensitivity(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    *,
    measured: bool = True,
    spared: bool = True,
    generator: torch.Generator,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """Harm of every site of `table`. Measuring takes one pass per site and batch, and one more for `spared`; the
    estimate takes one forward and one backward pass per batch. The model is unharmed afterwards.
    """
    plans = table.plans if measured else ()
    tables = [_only(table, plan) for plan in plans] + [_without(table, plan) for plan in plans if spared]
    harms = _harms(model, [table, *tables], calibration, on_progress)
    estimates = estimated_kl(model, table, calibration, generator=generator)
    everything, alone, rest = harms[0], harms[1 : 1 + len(plans)], harms[1 + len(plans) :]
    sites = [
        SiteHarm(
            plan.name,
            plan.site.layer,
            plan.site.role,
            alone=alone[i] if measured else None,
            spared=_saved(everything, rest[i]) if measured and spared else None,
            estimate=estimates.get(plan.name),
        )
        for i, plan in enumerate(table.plans)
    ]
    known = [(s.estimate, s.alone.kl) for s in sites if s.alone is not None and s.estimate is not None]
    agreement = rank_correlation([e for e, _ in known], [kl for _, kl in known])
    return Sensitivity(everything, tuple(sites), agreement)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rho; None for fewer than three pairs or when one side does not vary."""
    if len(a) != len(b):
        raise InvalidValueError(f"a rank correlation pairs values, but there are {len(a)} and {len(b)}")
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> torch.Tensor:
    """Ranks from 0, equal values sharing their mean rank."""
    exact = torch.tensor(values, dtype=torch.float64)
    below = (exact[:, None] > exact[None, :]).sum(1)
    equal = (exact[:, None] == exact[None, :]).sum(1)
    return below + (equal - 1) / 2


def _harms(
    model: nn.Module, tables: list[SiteTable], calibration: Calibration, on_progress: Progress | None
) -> list[Harm]:
    """Harm of each table over all batches; batches outside, so that one reference is held at a time."""
    found: list[list[Harm]] = [[] for _ in tables]
    done, total = 0, len(tables) * len(calibration.batches)
    for batch in calibration.batches:
        reference = reference_of(model, batch)
        for harms, table in zip(found, tables, strict=True):
            if table.plans:
                with attach(model, table) as attachment:
                    attachment.set_phase("evaluation")
                    harms.append(harm_of(model, batch, reference))
            else:
                harms.append(Harm(0.0, 0.0))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    weights = [int(batch.mask.sum()) for batch in calibration.batches]
    return [weighted(harms, weights) for harms in found]


def _only(table: SiteTable, plan: SitePlan) -> SiteTable:
    return replace(table, plans=(plan,))


def _without(table: SiteTable, plan: SitePlan) -> SiteTable:
    return replace(table, plans=tuple(p for p in table.plans if p is not plan))


def _saved(everything: Harm, without: Harm) -> Harm:
    return Harm(everything.kl - without.kl, everything.loss_change - without.loss_change)
