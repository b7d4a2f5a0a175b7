"""Small live objects of each kind under an injection, each with what its formulas in float64 give in its place."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fp4rl.inject.attach import attach
from fp4rl.lab.preflight.draws import Draws
from fp4rl.lab.preflight.kinds import ROWS, WIDTH, Kind, data, layers_above, linear_of, small, small_adapter, table_of
from fp4rl.lab.preflight.oracle import Latents, Oracle
from fp4rl.lab.preflight.products import IN_BANDS, Adapter, calls_of, experts, layer
from fp4rl.models.kernels import without_grouped_kernel
from fp4rl.spec.injection import Injection

_HEADS, _TOKENS, _HEAD = 2, 24, 64
# Rows of each expert: more than a block of 32, fewer, few, none; where they come sorted as many for each.
_ROWS_OF_EXPERTS, _BAND = (34, 10, 4, 0), 12
_PARTS = ("query", "latent", "rotary")
Made = dict[str, Tensor | None]
Compared = tuple[Made, dict[str, Tensor], Draws]


def _live(
    model: nn.Module, sites: Mapping[str, Injection], step: int | None, run: Callable[[], Tensor], g: Tensor
) -> tuple[Tensor, Draws]:
    """Run a small model forward and backward as what is injected makes it at a step of training."""
    with attach(model, table_of(model, sites)) as attachment, Draws().kept() as draws:
        attachment.set_phase("training", step)
        y = run()
        torch.autograd.backward(y, g)
    return y, draws.rewound()


def through(site: Injection, own: Any, x: Tensor, g: Tensor, step: int | None = None) -> tuple[Made, Draws]:
    """Return the result of a layer and both gradients, as the injection makes them at a step of training."""
    given = x.clone().requires_grad_()
    y, draws = _live(nn.Sequential(own), {"site": site}, step, lambda: own(given), g)
    return {"result": y, "grad_input": given.grad, "grad_weight": own.weight.grad}, draws


def of_layer(kind: Kind, step: int | None) -> Compared:
    """Return what a linear layer gives, what its formulas give, and what was drawn; so do all that follow."""
    x, weight, g = data((ROWS, WIDTH), (ROWS, WIDTH), (ROWS, ROWS))
    made, draws = through(kind.site, linear_of(weight, kind.like), x, g, step)
    if kind.like is not None and (stored := made["grad_weight"]) is not None:
        made["grad_weight"] = stored.mT
    return made, layer(Oracle(kind.site, step, draws), x, weight, g), draws


def of_adapter(kind: Kind, step: int | None) -> Compared:
    """Compare peft's layer: y, and the gradients of x, W, A and B."""
    own = small_adapter(kind.like)
    x, g = data((ROWS // 2, WIDTH), (ROWS // 2, ROWS))
    given, weight = x.clone().requires_grad_(), own.base_layer.weight
    y, draws = _live(nn.Sequential(own), kind.sites, step, lambda: own(given), g)
    made = {"result": y, "grad_input": given.grad, "grad_weight": weight.grad} | _of_matrices(own, "grad")
    return made, layer(Oracle(kind.site, step, draws), x, weight.detach(), g, _adapter(own)), draws


def _adapter(own: Any, experts: int = 1) -> Adapter:
    name = next(iter(own.lora_A))
    return Adapter(own.lora_A[name].weight.detach(), own.lora_B[name].weight.detach(), own.scaling[name], experts)


def _of_matrices(own: Any, prefix: str) -> Made:
    name = next(iter(own.lora_A))
    return {f"{prefix}_a": own.lora_A[name].weight.grad, f"{prefix}_b": own.lora_B[name].weight.grad}


def of_experts(kind: Kind, step: int | None) -> Compared:
    """Compare stacked experts, each token in one of them: y, and the gradients of x, of the stacks and of adapters."""
    model = small(kind)
    outermost: Any = model.module
    layers = {own.parameter_name: own for own in layers_above(outermost)}
    module = outermost.get_base_layer() if layers else outermost
    chosen = torch.arange(len(_ROWS_OF_EXPERTS)).repeat_interleave(torch.tensor(_ROWS_OF_EXPERTS))
    rows, hidden = len(chosen), model.config.hidden_size
    x, g, shares = data((rows, hidden), (rows, hidden), (rows, 1))
    chosen = chosen[shares[:, 0].argsort()]
    given = x.clone().requires_grad_()
    routed: tuple[Tensor, ...] = (chosen[:, None], shares)
    if kind.how == IN_BANDS:
        chosen, shares, routed = torch.arange(rows // _BAND).repeat_interleave(_BAND), torch.ones(rows, 1), ()
    with without_grouped_kernel():  # torch's knows no float64
        y, draws = _live(model, kind.sites, step, lambda: outermost(given, *routed), g)
    made: Made = {"result": y, "grad_input": given.grad}
    made |= {f"grad_{name}": weight.grad for name, weight in module._parameters.items()}
    for name, own in layers.items():
        made |= _of_matrices(own, f"grad_{name}")
    oracles = {name: Oracle(kind.sites.get(name, Injection()), step, draws) for name in module._parameters}
    adapters = {name: _adapter(own, len(module._parameters[name])) for name, own in layers.items()}
    calls, given_all = calls_of(kind.how, chosen), (x, shares, g)
    batched = kind.how in ("batched_mm", IN_BANDS)
    return made, experts(oracles, module, calls, given_all, adapters, batched=batched), draws


class Attention(nn.Module):
    """Heads over torch's own attention, or over the same `written` out, with projections of the usual names."""

    def __init__(self, *, written: bool = False) -> None:
        super().__init__()
        size = _HEADS * _HEAD
        self.written = written
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), data(*[(size, size)] * 3), strict=True):
            self.add_module(name, linear_of(weight / size**0.5))

    def heads(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values [heads, tokens, d] of x [tokens, size]."""
        return [p(x).unflatten(-1, (_HEADS, _HEAD)).transpose(0, 1) for p in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """Compute causal attention: [tokens, size] -> [heads, tokens, d]."""
        q, k, v = self.heads(x)
        if not self.written:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        shares = (torch.matmul(q, k.transpose(1, 2)) * _HEAD**-0.5 + _causal(len(x))).softmax(-1)
        return torch.matmul(shares, v)


def _causal(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)


def of_attention(kind: Kind, step: int | None, *, written: bool) -> Compared:
    """Compare attention by head, in torch's own product or in two matmuls: y, and the gradients of the projections."""
    x, g = data((_TOKENS, _HEADS * _HEAD), (_HEADS, _TOKENS, _HEAD))
    module = Attention(written=written)
    with torch.no_grad():
        q, k, v = module.heads(x)
    y, draws = _live(module, kind.sites, step, lambda: module(x), g)
    right = Oracle(kind.site, step, draws).attention(q, k, v, g)
    made: Made = {"result": y}
    for name, projection in zip(("grad_query", "grad_key", "grad_value"), module.children(), strict=True):
        assert isinstance(projection, nn.Linear)
        made[name] = projection.weight.grad
        right[name] = right[name].transpose(0, 1).flatten(-2).mT @ x
    return made, right, draws


def cached(site: Injection) -> tuple[Tensor, Tensor]:
    """Return values of many sequences of one token, and what a cache gives back: all attention is on that token."""
    module = Attention()
    (rows,) = data((ROWS, 1, _HEADS * _HEAD))
    with attach(module, table_of(module, {"site": site})) as attachment, torch.no_grad():
        attachment.set_phase("training")
        pairs = [(module.heads(x)[2], module(x)) for x in rows]
    seen, value = (torch.cat([pair[i] for pair in pairs]).flatten(0, 1) for i in (0, 1))
    return seen, value


class _Seen(TorchFunctionMode):
    """Keeps the queries and the scale of a call of torch's attention."""

    query: Tensor
    scale: float

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            self.query, self.scale = args[0], (kwargs or {})["scale"]
        return func(*args, **(kwargs or {}))


def of_latents(kind: Kind, step: int | None) -> Compared:
    """Compare attention over latents: y, and the gradients of x and of all weights.

    The formula gives those of queries, latents and rotary keys; autograd goes on from there, through transformers' own
    projections, norms and rotations.
    """
    model = small(kind, _attn_implementation="sdpa")
    module: Any = model.module
    x, g = data((1, _TOKENS, model.config.hidden_size), (1, _TOKENS, model.config.hidden_size))
    turned = next((type(each) for name, each in kind.model.named_modules() if name.endswith("rotary_emb")), None)
    given = x.clone().requires_grad_()
    called = {"attention_mask": _causal(_TOKENS)[None, None]}
    if turned is not None:
        called["position_embeddings"] = turned(config=model.config)(x, position_ids=torch.arange(_TOKENS)[None])
    with patch.object(module, "expand_kv", wraps=module.expand_kv) as expanded, _Seen() as seen:
        module(given, **called)
    parts = [seen.query[0], *(own[0, 0] for own in expanded.call_args.args)]
    last, up = module.o_proj.weight, module.kv_b_proj.weight
    weights = {name: own for name, own in module.named_parameters() if not name.startswith(("o_proj", "kv_b_proj"))}
    y, draws = _live(model, kind.sites, step, lambda: module(given, **called)[0], g)
    made = {"result": y, "grad_input": given.grad, "grad_up": up.grad, "grad_last": last.grad}
    made |= {f"grad_{name}": weight.grad for name, weight in weights.items()}
    with torch.no_grad():
        query, latent, rotary = (part.detach() for part in parts)
        latents = Latents(query, latent, rotary, up, seen.scale)
        heads = (g[0] @ last).unflatten(-1, (len(query), -1)).transpose(0, 1)
        right = Oracle(kind.site, step, draws).latent(latents, heads)
        joined = right.pop("result").transpose(0, 1).flatten(-2)
        right = {"result": module.o_proj(joined)[None], "grad_last": g[0].mT @ joined} | right
    of_parts = [right.pop(f"grad_{name}").view_as(part) for name, part in zip(_PARTS, parts, strict=True)]
    below = torch.autograd.grad(parts, [given, *weights.values()], of_parts)
    return made, right | {f"grad_{name}": own for name, own in zip(("input", *weights), below, strict=True)}, draws
