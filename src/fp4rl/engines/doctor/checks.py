"""Whether rounding and its gradients are right on this machine: each device against its definition."""

from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor

from fp4rl.inject.selftest import gradients
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.numerics.rounding import draw_seed
from fp4rl.numerics.selftest import Check, self_test
from fp4rl.spec.formats import FORMATS, Format, format_named
from fp4rl.spec.points import GRADIENTS, LINEAR_POINTS

PER_DEVICE = 3


def checks(device: torch.device) -> Iterator[Check]:
    """Yield the checks of a device: known vectors, kernels against their definition, gradients of every point."""
    yield _in_all(f"rounding, {device.type}", self_test(_on(device)))
    yield _in_all(f"kernels equal their definition, {device.type}", _same_as_defined(device))
    fmt = format_named("mxfp4")
    points = (*LINEAR_POINTS, *GRADIENTS)
    yield _in_all(f"gradients, {device.type}", (check for point in points for check in gradients(point, fmt, device)))


def _in_all(name: str, results: Iterator[Check] | tuple[Check, ...]) -> Check:
    began, made = perf_counter(), tuple(results)
    broken = [f"{check.name}: {check.seen}" for check in made if not check.passed]
    said = f"{len(made)} checks in {perf_counter() - began:.1f} s"
    return Check(name, not broken, "; ".join(broken) if broken else said)


def _on(device: torch.device) -> Callable[[Tensor, Format, torch.Generator], Tensor]:
    """Return a quantizer that rounds on a device; its random numbers depend on the generator's seed alone."""
    return lambda x, fmt, generator: fake_quantize(x.to(device), fmt, generator=generator).to(x.device)


def _same_as_defined(device: torch.device) -> Iterator[Check]:
    """Hold what rounds a large tensor, in every format and two dtypes, against the definition in plain PyTorch."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(512, 1024, generator=generator) * torch.logspace(-6, 3, 512).unsqueeze(1)
    for fmt in (fmt for fmt in FORMATS.values() if fmt.coarse is None):  # two scales are made of those of one
        for dtype in (torch.float32, torch.bfloat16):
            x = values.to(dtype)
            seed = draw_seed(torch.Generator().manual_seed(2)) if fmt.rounding == "stochastic" else None
            made = fake_quantize(x.to(device), fmt, generator=torch.Generator().manual_seed(2)).cpu()
            differing = int((made != reference(x, fmt, seed)).sum())
            yield Check(f"{fmt.name}, {dtype}", not differing, f"{differing} of {x.numel()} values differ")
