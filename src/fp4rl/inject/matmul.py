"""A matmul whose three products (result, grad_input, grad_weight) can each come out wrong, and whose gradient operand
can be rounded."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class ProductErrors(Protocol):
    """What a product asks of its site."""

    @property
    def in_forward(self) -> bool:
        """Whether the forward's result comes out wrong; else it is computed exactly as without an injection."""

    def result(self, product: str, y: Tensor, drawn_for: Tensor) -> Tensor:
        """The result of `product` (forward, grad_input or grad_weight) with its errors, seeded by `drawn_for`."""

    def gradient(self, product: str, g: Tensor) -> Tensor:
        """The gradient as an operand of `product`, rounded along its last axis where a format says so."""


class Product(torch.autograd.Function):
    """y = a b^T + bias with the site's errors in it. `a` [..., m, k], `b` [..., n, k], `bias` [n] -> [..., m, n].

    The error meets the product, before the bias is added.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, errors: ProductErrors) -> Tensor:
        """The result, errors of the forward in it."""
        ctx.save_for_backward(a, b)
        ctx.errors = errors
        if not errors.in_forward:
            return linear(a, b, bias) if b.ndim == 2 else a @ b.mT
        y = errors.result("forward", a @ b.mT, a)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """grad_input = g b reduces over n, grad_weight = g^T a over the rows m: each rounds g along its own axis."""
        a, b = ctx.saved_tensors
        errors: ProductErrors = ctx.errors
        g = gradients[0]
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = errors.result("grad_input", errors.gradient("grad_input", g) @ b, g)
        if ctx.needs_input_grad[1]:
            grad_b = errors.result("grad_weight", errors.gradient("grad_weight", g.mT) @ a, g)
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum(0)
        return grad_a, grad_b, grad_bias, None


def linear_with_errors(x: Tensor, weight: Tensor, bias: Tensor | None, errors: ProductErrors) -> Tensor:
    """`F.linear` through a product with errors, under autocast too."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        y: Tensor = Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, errors)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])
