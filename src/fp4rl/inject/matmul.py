"""A matmul with errors in its result, grad_input and grad_weight, and with a rounded gradient operand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fp4rl.inject.site import SiteState


class Product(torch.autograd.Function):
    """y = a b^T + bias with the errors of a site's `point`. `a` [..., m, k], `b` [..., n, k], `bias` [n].

    The error is put on the product [..., m, n] before the bias is added; without one, y is bit for bit `F.linear`.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, site: SiteState, point: str) -> Tensor:
        """Return the result, with the errors of the forward."""
        ctx.save_for_backward(a, b)
        ctx.site, ctx.point = site, point
        if not any(error.forward and error.point == point for error in site.errors):
            return linear(a, b, bias) if b.ndim == 2 else a @ b.mT
        y = site.with_errors(a @ b.mT, point, a)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Compute grad_input = g b, which sums over n, and grad_weight = g^T a over m: each rounds g along its axis."""
        a, b = ctx.saved_tensors
        site: SiteState = ctx.site
        g = gradients[0]
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = site.with_errors(site.gradient("grad_input", g) @ b, ctx.point, g, backward="grad_input")
        if ctx.needs_input_grad[1]:
            grad_b = site.with_errors(site.gradient("grad_weight", g.mT) @ a, ctx.point, g, backward="grad_weight")
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum(0)
        return grad_a, grad_b, grad_bias, None, None


class BothWays(torch.autograd.Function):
    """Returns `result`; in the backward the gradient goes to two products, each of which passes it to one operand."""

    @staticmethod
    def forward(_ctx: Any, _by_input: Tensor, _by_weight: Tensor, result: Tensor) -> Tensor:
        """Return a copy of `result`, since it may be written in place; all three have the same shape."""
        return result.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient twice."""
        return gradients[0], gradients[0], None


def in_backward(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return x itself, whose gradient, where it has one, becomes `change` of it."""
    if x.requires_grad:
        x.register_hook(change)  # type: ignore[no-untyped-call]
    return x


def linear_with_errors(x: Tensor, weight: Tensor, bias: Tensor | None, site: SiteState) -> Tensor:
    """Compute `F.linear` through a product with errors, under autocast too."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        y: Tensor = Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, site, "matmul")  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])
