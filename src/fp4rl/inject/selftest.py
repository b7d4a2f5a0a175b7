"""The gradients of a layer that rounds one point of an injection, against the products written out in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import attach
from fp4rl.numerics.reference import reference
from fp4rl.numerics.selftest import Check
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection

_ROWS, _WIDTH = 96, 128


def gradients(point: str, fmt: Format, device: torch.device) -> Iterator[Check]:
    """Compare the result and both gradients of a layer that rounds `point` to `fmt` with their definition.

    `point` is one of a linear layer or a gradient; `fmt` has a factor of its own, for the tensor or each token, and is
    not stochastic.
    """
    generator = torch.Generator().manual_seed(3)
    x, g, weight = (
        torch.randn(rows, width, dtype=torch.float64, generator=generator)
        for rows, width in ((_ROWS, _WIDTH), (_ROWS, _ROWS), (_ROWS, _WIDTH))
    )
    layer = nn.Linear(_WIDTH, _ROWS, bias=False, dtype=torch.float64, device=device)
    with torch.no_grad():
        layer.weight.copy_(weight)
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
        yield Check(f"{name} under {point} {fmt.name}", error <= allowed, f"off by {error:.2g}")
