"""A live attention module with rounded keys and values and errors in its products, wherever its forward computes them.

The module's forward runs unchanged under a `TorchFunctionMode`, which is entered inside that forward, so that gradient
checkpointing enters it again. It intercepts `scaled_dot_product_attention`, or the two matmuls of the eager formula.
Where a cache holds one latent vector for all heads (MLA), that and the rotary key are rounded where the module expands
them, and the keys and values that come of it are not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fp4rl.inject.matmul import Product
from fp4rl.inject.site import KEY, SiteState
from fp4rl.spec.errors import InvalidValueError

EXPANDS = "expand_kv"  # transformers' name, in every class, for what makes keys and values of the cached latents
_BIASED = (torch.baddbmm, Tensor.baddbmm)
_MATMULS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


class AttentionState(SiteState):
    """The state of an injected attention module: whether its cache is rounded, and which products have errors."""

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with its products intercepted while anything is active."""
        original: Any = self.original
        if not (self.points or self.errors):
            return original.forward(module, *args, **kwargs)
        if self.latent and not self.has_errors("scores", "values"):
            self.count()
            return original.forward(module, *args, **kwargs)
        with _Intercept(self) as products:
            out = original.forward(module, *args, **kwargs)
        products.require_attention(module)
        return out

    @property
    def latent(self) -> bool:
        """Whether the cache holds what `expand_kv` makes keys and values of."""
        return hasattr(self.original, EXPANDS)

    def cached(self, x: Tensor) -> Tensor:
        """Return keys or values [..., tokens, head_dim] as the cache stores them: rounded per head and token."""
        return x if self.latent else self.stored(x)

    def stored(self, x: Tensor) -> Tensor:
        """Return a vector a token, [..., tokens, size], as a cache of it gives it back."""
        return self.rounded_values(x, "kv_cache") if "kv_cache" in self.points else x

    def product(self, a: Tensor, b: Tensor, point: str) -> Tensor:
        """Return a b^T over the last axis, with the errors of `scores` or `values`."""
        if not self.has_errors(point):
            return a @ b.mT
        return Product.apply(a, b, None, self, point)  # type: ignore[no-any-return, no-untyped-call]


def expanding_stored(module: nn.Module, *latents: Tensor) -> Any:
    """Return keys and values, made by a class's `expand_kv` of rounded latent vectors and rotary keys."""
    state: AttentionState = module.__dict__[KEY]
    return getattr(state.original, EXPANDS)(module, *map(state.stored, latents))


class _Intercept(TorchFunctionMode):
    """Catches the products of one attention call; the eager formula computes scores first, values second."""

    def __init__(self, state: AttentionState) -> None:
        super().__init__()
        self.state = state
        self.whole = self.eager = 0  # calls of sdpa, and single products

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self.whole += 1
            return _attention(self.state, *args, **kwargs)
        if func in _MATMULS and len(args) == 2 and min(x.ndim for x in args) >= 3:  # not x @ W.T, as of FalconLinear
            return self._eager(*args)
        if func in _BIASED:
            return self._biased(*args, **kwargs)
        return func(*args, **kwargs)

    def _eager(self, a: Tensor, b: Tensor) -> Tensor:
        self.eager += 1
        if self.eager % 2:  # query [..., m, d] times key transposed [..., d, n]
            self.state.count()
            return self.state.product(a, self.state.cached(b.mT), "scores")
        return self.state.product(a, self.state.cached(b).mT, "values")

    def _biased(self, bias: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return beta * bias + alpha * self._eager(batch1, batch2)

    def require_attention(self, module: nn.Module) -> None:
        """Raise InvalidValueError where the products met cannot be told apart: the wrong tensors may be rounded."""
        if bool(self.whole) == bool(self.eager) or self.eager % 2:
            kind, name = type(module).__name__.removeprefix("Injected"), self.state.plan.name
            raise InvalidValueError(
                f"{name}: {kind} multiplies {self.eager} times and calls sdpa {self.whole} times, so what is a key and "
                "what a value is not known; leave kv_cache (and errors of scores and values) out, or this layer: "
                f"targets.leave: [{name}]"
            )


def _attention(  # noqa: PLR0913 - the signature of torch's own function
    state: AttentionState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `scaled_dot_product_attention` over a rounded cache; step by step where its products have errors."""
    state.count()
    key, value = state.cached(key), state.cached(value)
    if not state.has_errors("scores", "values"):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = state.product(query, key, "scores") * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    masked = scores.isneginf().all(-1, keepdim=True)  # as in sdpa: a row that is masked entirely is 0, not NaN
    weights = scores.masked_fill(masked, 0.0).softmax(-1, dtype=torch.float32).masked_fill(masked, 0.0).to(query.dtype)
    return state.product(dropout(weights, dropout_p), value.mT, "values")
