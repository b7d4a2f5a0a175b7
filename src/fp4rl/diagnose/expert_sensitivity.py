"""The effect of each expert's error on the output: estimated for all by backward passes, measured for the worst."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.estimate import DRAWS, log_prob_of_own_answers, rounded_product
from fp4rl.diagnose.experts import OwnProduct, one_by_one, watching
from fp4rl.diagnose.passes import Divergence, Progress, divergence_of, logits_of, reference_of, weighted
from fp4rl.inject.experts import ExpertProduct
from fp4rl.inject.plan import SitePlan, SiteTable

Expert = tuple[str, int]  # the name of its stack, its number


@dataclass(frozen=True)
class ExpertSensitivity:
    """The effect of rounding one expert of one stack and nothing else, in nats per token; `tokens` were routed to it.

    `estimate` as a backward pass predicts it; `leave_one_in` measured, None where it was not.
    """

    site: str
    expert: int
    tokens: int
    estimate: float
    leave_one_in: Divergence | None = None

    @property
    def kl(self) -> float:
        """The KL, measured or else estimated; never below 0."""
        return max(0.0, self.estimate if self.leave_one_in is None else self.leave_one_in.kl)


def expert_sensitivity(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    *,
    measured: int,
    generator: torch.Generator,
    on_progress: Progress | None = None,
) -> tuple[ExpertSensitivity, ...]:
    """Estimate the effect of every expert that the texts reach, and measure the `measured` of the largest estimate.

    Ranked by effect, the measured first. Estimating takes a forward and a few backward passes a text for all experts
    together; measuring a forward a batch for each.
    """
    loads: dict[Expert, int] = defaultdict(int)
    estimates = _estimated(model, table, calibration, generator, loads)
    ranked = sorted(estimates, key=lambda expert: estimates[expert], reverse=True)
    known = _divergences(model, table, calibration, ranked[:measured], on_progress)
    each = [ExpertSensitivity(*expert, loads[expert], estimates[expert], known.get(expert)) for expert in ranked]
    return tuple(sorted(each, key=lambda e: (e.leave_one_in is not None, e.kl), reverse=True))


def in_words(table: SiteTable, experts: Sequence[ExpertSensitivity]) -> str:
    """Return which experts' KL was measured, which estimated, and of how many nothing is known; empty without any."""
    total = sum(plan.site.shape[0] for plan in table.plans if plan.site.kind == "experts")
    measured = sum(e.leave_one_in is not None for e in experts)
    missing = total - len(experts)
    unknown = f", of {missing} unknown: no product of theirs was met" if missing else ""
    text = f"KL of single experts: of {measured} of {total} measured, of {len(experts) - measured} estimated{unknown}"
    return text if total else ""


def worst_in_words(worst: ExpertSensitivity, experts: Sequence[ExpertSensitivity]) -> str:
    """Return the largest effect of an expert, beside the median of all."""
    usual, how = median(e.kl for e in experts), "estimated" if worst.leave_one_in is None else "measured"
    text = f"expert {worst.expert} of {worst.site} does most of all experts: a KL of {worst.kl:.2g} nats ({how})"
    return text + (f", {worst.kl / usual:.3g} times the median" if usual > 0 else "")


def _estimated(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    generator: torch.Generator,
    loads: dict[Expert, int],
) -> dict[Expert, float]:
    """Return the estimates as `estimated_kl` makes them for linear layers, a text at a time; count `loads`."""
    stacks = [plan for plan in table.plans if plan.site.kind == "experts"]
    sums: dict[Expert, float] = defaultdict(float)
    texts = (text for batch in calibration.batches for text in one_by_one(batch)) if stacks else ()
    dtype = getattr(torch, table.injection.dtype)
    for text in texts:
        for along in _along(model, stacks, text, dtype, generator, loads):
            for expert, value in along.items():
                sums[expert] += value**2 / DRAWS
    return {expert: 0.5 * total / calibration.tokens for expert, total in sums.items()}


def _along(
    model: nn.Module,
    stacks: Sequence[SitePlan],
    text: Batch,
    dtype: torch.dtype,
    generator: torch.Generator,
    loads: dict[Expert, int],
) -> list[dict[Expert, float]]:
    """Return sum_t g_t . d_t by expert for each drawn answer: gradients of its log-probability, errors of outputs."""
    outputs: list[Tensor] = []
    errors: list[tuple[SitePlan, list[tuple[OwnProduct, Tensor]]]] = []

    def tap(plan: SitePlan, product: ExpertProduct, parts: list[OwnProduct]) -> Tensor:
        y = product.compute(product.x, product.weight)
        y = y if y.requires_grad else y.detach().requires_grad_()  # frozen weights: the graph starts here
        with torch.no_grad():
            each = [(p, rounded_product(p.x, p.weight, None, plan, dtype) - y[p.at]) for p in parts if p.x.any()]
        for part, _ in each:
            loads[plan.name, part.expert] += int(part.x.any(-1).sum())
        outputs.append(y)
        errors.append((plan, each))
        return y

    with watching(model, stacks, tap), torch.enable_grad():
        logits = logits_of(model, text)
    draws = []
    for draw in range(DRAWS if outputs else 0):
        along: dict[Expert, float] = defaultdict(float)
        log_prob = log_prob_of_own_answers(logits, text, generator)
        gradients = torch.autograd.grad(log_prob, outputs, retain_graph=draw + 1 < DRAWS, allow_unused=True)
        for gradient, (plan, each) in zip(gradients, errors, strict=True):
            for part, error in each if gradient is not None else ():
                along[plan.name, part.expert] += float((gradient[part.at].float() * error.float()).sum())
        draws.append(along)
    return draws


def _divergences(
    model: nn.Module,
    table: SiteTable,
    calibration: Calibration,
    experts: Sequence[Expert],
    on_progress: Progress | None,
) -> dict[Expert, Divergence]:
    """Return the divergence over all batches with one expert rounded at a time."""
    plans, dtype = {plan.name: plan for plan in table.plans}, getattr(torch, table.injection.dtype)
    by_expert: dict[Expert, list[Divergence]] = defaultdict(list)
    done, total = 0, len(experts) * len(calibration.batches)
    for batch in calibration.batches if experts else ():
        reference = reference_of(model, batch)
        for site, number in experts:

            def round_it(
                plan: SitePlan, product: ExpertProduct, parts: list[OwnProduct], number: int = number
            ) -> Tensor:
                y = product.compute(product.x, product.weight)
                for part in parts:
                    if part.expert == number and part.x.numel():
                        y[part.at] = rounded_product(part.x, part.weight, None, plan, dtype)
                return y

            with watching(model, [plans[site]], round_it):
                by_expert[site, number].append(divergence_of(model, batch, reference))
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    weights = [int(batch.mask.sum()) for batch in calibration.batches]
    return {expert: weighted(by_batch, weights) for expert, by_batch in by_expert.items()}
