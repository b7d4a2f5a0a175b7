"""The effect of each site's error on the output, by rounding one site at a time; its size alone does not tell."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.estimate import estimated_kl
from fp4rl.diagnose.expert_sensitivity import ExpertSensitivity
from fp4rl.diagnose.passes import Divergence, Progress, divergence_of, reference_of, weighted
from fp4rl.inject.attach import Attachment, attach
from fp4rl.inject.plan import SiteTable
from fp4rl.spec.errors import CheckFailed, InvalidValueError


@dataclass(frozen=True)
class SiteSensitivity:
    """The effect of rounding one site on the output.

    `leave_one_in`: with only this site rounded. `leave_one_out`: what is saved when all sites but this one are rounded.
    `estimate`: the KL of `leave_one_in`, in nats per token, as a backward pass predicts it (None for other sites than
    linear layers).
    """

    name: str
    layer: int | None
    role: str
    leave_one_in: Divergence | None
    leave_one_out: Divergence | None
    estimate: float | None

    @property
    def kl(self) -> float:
        """The KL with only this site rounded, measured or else estimated; never below 0."""
        return max(0.0, self.leave_one_in.kl if self.leave_one_in is not None else self.estimate or 0.0)


@dataclass(frozen=True)
class Sensitivity:
    """`everything`: with the whole table. `rank_correlation` (Spearman): of estimates and measured `leave_one_in`.

    `experts` are those that the texts reach, ranked (see `expert_sensitivity`).
    """

    everything: Divergence
    sites: tuple[SiteSensitivity, ...]
    rank_correlation: float | None
    experts: tuple[ExpertSensitivity, ...] = ()


def sensitivity(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    *,
    measured: bool = True,
    leave_one_out: bool = True,
    generator: torch.Generator,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """Measure and estimate the effect of every site of `table` on the output. The model is unchanged afterwards.

    Measuring takes a pass per site and batch, and one more for `leave_one_out`; estimating a forward and a backward.
    Sites that a backward cannot estimate (stacked experts, caches) are measured even without `measured`.
    """
    estimates = estimated_kl(model, table, calibration, generator=generator)
    alone = [plan for plan in table.plans if measured or plan.name not in estimates]
    without = table.plans if measured and leave_one_out else ()
    tables = [table, *(replace(table, plans=(plan,)) for plan in alone)]
    tables += [replace(table, plans=tuple(other for other in table.plans if other is not plan)) for plan in without]
    everything, *rest = divergences(model, tables, calibration, on_progress)
    each = dict(zip((plan.name for plan in alone), rest, strict=False))
    others = dict(zip((plan.name for plan in without), rest[len(alone) :], strict=True))
    sites = [
        SiteSensitivity(
            plan.name,
            plan.site.layer,
            plan.site.role,
            leave_one_in=each.get(plan.name),
            leave_one_out=everything - others[plan.name] if plan.name in others else None,
            estimate=estimates.get(plan.name),
        )
        for plan in table.plans
    ]
    known = [(s.estimate, s.leave_one_in.kl) for s in sites if s.leave_one_in is not None and s.estimate is not None]
    agreement = rank_correlation([e for e, _ in known], [kl for _, kl in known])
    return Sensitivity(everything, tuple(sites), agreement)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rho; None for fewer than three pairs or when one side is constant."""
    if len(a) != len(b):
        raise InvalidValueError(f"a rank correlation pairs values, but there are {len(a)} and {len(b)}")
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> torch.Tensor:
    """Return ranks from 0; equal values get their mean rank."""
    exact = torch.tensor(values, dtype=torch.float64)
    below = (exact[:, None] > exact[None, :]).sum(1)
    equal = (exact[:, None] == exact[None, :]).sum(1)
    return below + (equal - 1) / 2


def _unreached(attachment: Attachment) -> CheckFailed | None:
    """Return what should have been rounded and was not; None where rounding just changed nothing."""
    try:
        attachment.require_calls()
    except CheckFailed as error:
        return CheckFailed(f"a KL of 0 that is none: {error}; leave it out: targets.leave")
    return None


def divergences(
    model: nn.Module, tables: list[SiteTable], calibration: Calibration, on_progress: Progress | None = None
) -> list[Divergence]:
    """Return the divergence of each table over all batches; the outer loop is over batches, to hold one reference."""
    by_table: list[list[Divergence]] = [[] for _ in tables]
    unreached: dict[int, list[CheckFailed]] = defaultdict(list)
    done, total = 0, len(tables) * len(calibration.batches)
    for batch in calibration.batches:
        reference = reference_of(model, batch)
        for number, (of_table, table) in enumerate(zip(by_table, tables, strict=True)):
            if table.plans:
                with attach(model, table) as attachment:
                    attachment.set_phase("evaluation")
                    of_table.append(divergence_of(model, batch, reference))
                    if of_table[-1].kl == 0 and (why := _unreached(attachment)):
                        unreached[number].append(why)
            else:
                of_table.append(Divergence(0.0, 0.0))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    for failures in unreached.values():
        if len(failures) == len(calibration.batches):  # a KL of 0 that says nothing; an expert may miss one batch
            raise failures[0]
    weights = [int(batch.mask.sum()) for batch in calibration.batches]
    return [weighted(of_table, weights) for of_table in by_table]
