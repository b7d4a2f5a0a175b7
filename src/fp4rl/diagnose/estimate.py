"""Estimates the KL that rounding each site costs, from one backward pass: gradient times error, Fisher weighted.

To second order KL = 1/2 E[(sum_t g_t . d_t)^2] over answers drawn from the model itself, where g_t is the gradient of
their log-probability at a site's output for token t, and d_t the error of that output by rounding. Only because the
answers are drawn from the model is E[g g'] the Fisher information (Martens 2020, arXiv 1412.1193, section 5).
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.passes import logits_of
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.sites.observe import hooked
from fp4rl.sites.walk import as_used
from fp4rl.spec.formats import Format

DRAWS = 4  # answers drawn per token; each costs a backward pass but no forward


def estimated_kl(
    model: nn.Module, table: SiteTable, calibration: Calibration, *, generator: torch.Generator, draws: int = DRAWS
) -> dict[str, float]:
    """Predict for each linear site the KL, in nats per token, of rounding it alone. No parameter gets a gradient."""
    dtype = getattr(torch, table.injection.dtype)
    places = {path: plan for plan in table.plans if plan.site.kind == "linear" for path in plan.site.places}
    sums = {plan.name: 0.0 for plan in places.values()}
    for batch in calibration.batches:
        taps: dict[str, tuple[Tensor, Callable[[torch.dtype], Tensor]]] = {}
        with hooked(model, {path: _tap(taps, path, plan) for path, plan in places.items()}), torch.enable_grad():
            logits = logits_of(model, batch)
            called = [path for path in places if path in taps]  # an expert may get no token
            outputs = [taps[path][0] for path in called]
            for draw in range(draws):
                log_prob = log_prob_of_own_answers(logits, batch, generator)
                gradients = torch.autograd.grad(log_prob, outputs, retain_graph=draw + 1 < draws, allow_unused=True)
                along: dict[str, Any] = defaultdict(float)  # a shared weight's errors come together
                for path, gradient in zip(called, gradients, strict=True):
                    if gradient is not None:
                        along[places[path].name] += _along(gradient, taps[path][1](dtype), batch)
                for name, product in along.items():
                    sums[name] += float(product.square().sum()) / draws
    return {name: 0.5 * total / calibration.tokens for name, total in sums.items()}


def _along(gradient: Tensor, error: Tensor, batch: Batch) -> Tensor:
    """Return sum_t g_t . d_t for every sequence [batch]; the tokens of an expert count as one sequence."""
    product = (gradient.float() * error.float()).sum(-1)
    return product.sum(-1) if product.shape == batch.mask.shape else product.sum()


def log_prob_of_own_answers(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Return the log-probability of one answer that the model draws at every position, in the graph."""
    mask = batch.mask.bool().to(logits.device)
    log_probs = torch.log_softmax(logits[mask].float(), -1)
    # A token is drawn at every position of the given text, so that one forward serves all draws.
    drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    return log_probs.gather(-1, drawn).sum()


def _tap(taps: dict[str, Any], path: str, plan: SitePlan) -> Callable[..., Tensor]:
    """Return a hook that stores, by the layer's path, the output in the graph and a function that returns its error."""

    def hook(layer: nn.Linear, args: tuple[Tensor, ...], _kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not output.requires_grad:  # frozen weights: the graph starts here
            output = output.detach().requires_grad_()
        x, known = args[0].detach(), dict[torch.dtype, Tensor]()

        def error(dtype: torch.dtype) -> Tensor:
            if dtype not in known:
                known[dtype] = output_error(x, layer, plan, dtype)
            return known[dtype]

        taps[path] = (output, error)
        return output

    return hook


@torch.no_grad()
def output_error(x: Tensor, layer: nn.Linear, plan: SitePlan, dtype: torch.dtype) -> Tensor:
    """Return the error [..., out] that rounding adds to the layer's output for the input [..., in] that it had."""
    weight = as_used(plan.site, layer.weight.detach())
    return rounded_product(x, weight, layer.bias, plan, dtype) - linear(x, weight, layer.bias)


def rounded_product(x: Tensor, weight: Tensor, bias: Tensor | None, plan: SitePlan, dtype: torch.dtype) -> Tensor:
    """Return x W^T + b with each operand, and the result, rounded where the plan rounds it; `weight` is [out, in]."""
    injected = linear(_rounded(x, plan.input, dtype), _rounded(weight, plan.weight, dtype), bias)
    return _rounded(injected, plan.output, dtype)


def _rounded(x: Tensor, fmt: Format | None, dtype: torch.dtype) -> Tensor:
    if fmt is None:
        return x
    generator = torch.Generator(x.device).manual_seed(0) if fmt.rounding == "stochastic" else None
    return fake_quantize(x.to(dtype), fmt, generator=generator).to(x.dtype)
