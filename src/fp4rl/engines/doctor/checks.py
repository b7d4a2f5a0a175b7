"""Whether rounding and its gradients are right on this machine: each device against a statement in float64."""

from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import attach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.numerics.rounding import draw_seed
from fp4rl.numerics.selftest import Check, self_test
from fp4rl.spec.formats import FORMATS, Format, format_named
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS, LINEAR_POINTS

PER_DEVICE = 3
_ROWS, _WIDTH = 96, 128


def checks(device: torch.device) -> Iterator[Check]:
    """Yield the checks of a device: known vectors, kernels against their definition, gradients of every point."""
    yield _in_all(f"rounding, {device.type}", self_test(_on(device)))
    yield _in_all(f"kernels equal their definition, {device.type}", _same_as_defined(device))
    yield _in_all(f"gradients, {device.type}", _gradients(device))


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


def _gradients(device: torch.device) -> Iterator[Check]:
    """Hold the gradients of a layer, one point of the injection at a time, against the products written out."""
    fmt = format_named("mxfp4")
    for point in FORMAT_POINTS:
        if point in (*LINEAR_POINTS, *GRADIENTS):
            yield from _gradients_at(point, fmt, device)


def _gradients_at(point: str, fmt: Format, device: torch.device) -> Iterator[Check]:
    torch.manual_seed(3)
    x, g = torch.randn(_ROWS, _WIDTH, dtype=torch.float64), torch.randn(_ROWS, _ROWS, dtype=torch.float64)
    layer = nn.Linear(_WIDTH, _ROWS, bias=False, dtype=torch.float64).to(device)
    weight = layer.weight.detach().cpu()
    given = x.to(device, copy=True).requires_grad_()
    with attach(nn.Sequential(layer), Injection.model_validate({point: fmt, "dtype": "float32"})):
        y = layer(given)
        y.backward(g.to(device))

    def rounded(name: str, value: Tensor) -> Tensor:
        return reference(value.float().contiguous(), fmt, None).double() if name == point else value

    q_x, q_w = rounded("input", x), rounded("weight", weight)
    wanted = {
        "result": rounded("output", q_x @ q_w.mT),
        "grad_input": rounded("grad_input", g) @ q_w,
        "grad_weight": rounded("grad_weight", g.mT) @ q_x,
    }
    made = {"result": y, "grad_input": given.grad, "grad_weight": layer.weight.grad}
    for name, right in wanted.items():
        tensor = made[name]
        error = float("inf") if tensor is None else float((tensor.detach().cpu() - right).abs().max())
        # An output on a rounding tie may fall to the other side: sums differ in their last bits.
        allowed = 1.0 if name == "result" and point == "output" else 1e-9
        yield Check(f"{name} under rounded {point}", error <= allowed, f"off by {error:.2g}")
