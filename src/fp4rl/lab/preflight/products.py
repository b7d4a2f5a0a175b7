"""Products with rounded weights by their formulas in float64: of linear layers, of adapters, of stacked experts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4rl.lab.preflight.oracle import Oracle, Through

# What one matmul computes: experts, each with the numbers of its rows.
Call = tuple[tuple[int, Tensor], ...]
IN_BANDS = "Llama4TextExperts"  # its rows come sorted, as many for each expert


class _Made(NamedTuple):
    rows: Tensor
    given: Tensor
    x: Through
    y: Through


class Product:
    """y = Q(x) Q(W)^T + b + x D^T of matrices W and D [experts, out, in], each with rows of its own, and its gradients.

    D is what adapters add that are not merged.
    """

    def __init__(
        self,
        oracle: Oracle,
        weight: Tensor,
        calls: tuple[Call, ...],
        bias: Tensor | None = None,
        beside: Tensor | None = None,
        *,
        batched: bool = False,
    ) -> None:
        self._oracle, self._calls, self._bias, self._beside = oracle, calls, bias, beside
        self._batched = batched
        self._stacked = len(weight) > 1
        self._rounded = [oracle.through("weight", each.contiguous()) for each in weight]
        self._weight = oracle.wrong("weight", torch.stack([each.value for each in self._rounded]))
        self._made: list[_Made] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return y [rows, out] of x [rows, in]."""
        y = x.new_zeros(len(x), self._weight.shape[1])
        for call in self._calls:
            rows = torch.cat([own for _, own in call])
            q_x = self._oracle.through("input", x[rows])
            q_x = q_x._replace(value=self._oracle.wrong("input", q_x.value))
            parts = zip(call, _split(q_x.value, call), strict=True)
            made = self._oracle.wrong("matmul", torch.cat([part @ self._weight[e].mT for (e, _), part in parts]))
            if self._bias is not None:
                made = made + torch.cat([self._bias[e].expand(len(own), -1) for e, own in call])
            out = self._oracle.through("output", made)
            y[rows] = out.value
            if self._beside is not None:
                parts = zip(call, _split(x[rows], call), strict=True)
                y[rows] += torch.cat([part @ self._beside[e].mT for (e, _), part in parts])
            self._made.append(_Made(rows, x[rows], q_x, out))
        return y

    def backward(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x, W and D, given that of y: each rounds g along the axis that it sums over."""
        grad_x, grad_w = g.new_zeros(len(g), self._weight.shape[2]), torch.zeros_like(self._weight)
        grad_d = torch.zeros_like(self._weight)
        for call, (rows, given, q_x, out) in reversed([*zip(self._calls, self._made, strict=True)]):
            whole = out.passed(g[rows])
            to_x = _split(self._oracle.through("grad_input", whole).value, call)
            to_w = self._along_rows(_split(whole, call))
            of_x = torch.cat([own @ self._weight[e] for (e, _), own in zip(call, to_x, strict=True)])
            of_w = torch.stack([own @ part for own, part in zip(to_w, _split(q_x.value, call), strict=True)])
            of_x, of_w = self._wrong(of_x, of_w)
            grad_x[rows] = q_x.passed(of_x)
            for (expert, _), own in zip(call, of_w, strict=True):
                grad_w[expert] += own
            for (expert, own_rows), own, part in zip(call, _split(g[rows], call), _split(given, call), strict=True):
                grad_d[expert] += own.mT @ part
                if self._beside is not None:
                    grad_x[own_rows] += own @ self._beside[expert]
        passed = [each.passed(own) for each, own in zip(self._rounded, grad_w, strict=True)]
        return grad_x, torch.stack(passed), grad_d

    def _along_rows(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Return g^T [out, rows] of each expert, rounded along its rows: where all are batched, in one tensor."""
        if not self._batched:
            return [self._oracle.through("grad_weight", part.mT.contiguous()).value for part in parts]
        turned = torch.stack([part.mT for part in parts])
        return [*self._oracle.through("grad_weight", turned).value]

    def _wrong(self, *products: Tensor) -> list[Tensor]:
        """Return both gradients with errors, which are drawn in the order in which autograd comes to the products."""
        turn = -1 if self._stacked else 1
        return [self._oracle.wrong("matmul", own, backward=True) for own in products[::turn]][::turn]


def _split(x: Tensor, call: Call) -> tuple[Tensor, ...]:
    return torch.split(x, [len(own) for _, own in call])


class Adapter(NamedTuple):
    """peft's matrices of stacked experts, A [experts r, in] and B [out, r experts], and their scaling; those of a layer
    are of one expert."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int = 1

    @property
    def _each(self) -> tuple[Tensor, Tensor]:
        a = self.a.reshape(self.experts, -1, self.a.shape[1])
        return a, torch.stack([self.b[:, e :: self.experts] for e in range(self.experts)])

    def delta(self, stored: Tensor) -> Tensor:
        """Return s B A of each expert, laid out as the weight is stored, [experts, out, in] or [experts, in, out]."""
        a, b = self._each
        made = b @ a * self.scaling
        return made if made.shape == stored.shape else made.mT

    def gradients(self, of_delta: Tensor) -> dict[str, Tensor]:
        """Return the gradients of A and B, given that of s B A in either layout."""
        a, b = self._each
        g = self.scaling * (of_delta if of_delta.shape[1:] == (b.shape[1], a.shape[2]) else of_delta.mT)
        grad_b = torch.empty_like(self.b)
        for e, own in enumerate(g @ a.mT):
            grad_b[:, e :: self.experts] = own
        return {"a": (b.mT @ g).flatten(0, 1), "b": grad_b}


def layer(oracle: Oracle, x: Tensor, weight: Tensor, g: Tensor, adapter: Adapter | None = None) -> dict[str, Tensor]:
    """Return y = Q(x) Q(W)^T and the gradients of x [rows, in] and W [out, in], given that of y [rows, out]; under an
    adapter Q(x) Q(W + sBA)^T, or Q(x) Q(W)^T + s x A^T B^T where it is not merged, and the gradients of A and B too."""
    product = _adapted(oracle, weight[None], adapter, (((0, torch.arange(len(x))),),))
    y = product.forward(x)
    grad_x, grad_w, grad_d = product.backward(g)
    made = {"result": y, "grad_input": grad_x, "grad_weight": grad_w[0]}
    of_delta = grad_w if oracle.injection.lora == "merged" else grad_d
    return made | ({} if adapter is None else {f"grad_{k}": v for k, v in adapter.gradients(of_delta).items()})


def _adapted(
    oracle: Oracle,
    weight: Tensor,
    adapter: Adapter | None,
    calls: tuple[Call, ...],
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    batched: bool = False,
) -> Product:
    """Return the product of a stored weight with what an adapter adds to it, before it is rounded or beside it."""
    added = None if adapter is None else adapter.delta(weight)
    if added is not None and oracle.injection.lora == "merged":
        weight, added = weight + added, None
    if transposed:
        weight, added = weight.mT, None if added is None else added.mT
    return Product(oracle, weight, calls, bias, added, batched=batched)


def calls_of(how: str, chosen: Tensor) -> tuple[Call, ...]:
    """Return what the matmuls of an implementation compute, where each row goes to one expert: `eager` has a matmul an
    expert, `grouped_mm` one of all sorted rows, `batched_mm` one of a matrix a row."""
    if how == "batched_mm":
        return (tuple((int(expert), torch.tensor([row])) for row, expert in enumerate(chosen)),)
    # Where rows are sorted, it is in whatever order that leaves those of one expert: blocks run along it.
    order = chosen.sort().indices if how == "grouped_mm" else torch.arange(len(chosen))
    parts = tuple((expert, order[chosen[order] == expert]) for expert in sorted({*chosen.tolist()}))
    return (parts,) if how in ("grouped_mm", IN_BANDS) else tuple((part,) for part in parts)


def experts(
    oracles: Mapping[str, Oracle],
    module: Any,
    calls: tuple[Call, ...],
    given: tuple[Tensor, ...],
    adapters: Mapping[str, Adapter],
    *,
    batched: bool = False,
) -> dict[str, Tensor]:
    """Return what experts make of rows x [rows, in], times each row's share, and the gradients of x and of the stacks
    as they are stored; `given` are x, the shares and the gradient of the result. The activation is the module's own.
    `batched`: a matmul has rows of several experts as [experts, rows, in]."""
    x, shares, g = given
    held = {name: own.detach() for name, own in module.named_parameters(recurse=False)}
    first, second = "gate_up_proj" if "gate_up_proj" in held else "up_proj", "down_proj"
    turned = is_transposed(module)
    up, down = (
        _adapted(oracles[n], held[n], adapters.get(n), calls, held.get(f"{n}_bias"), transposed=turned, batched=batched)
        for n in (first, second)
    )
    h = up.forward(x).requires_grad_()
    a = _activated(module, h, gated=first.startswith("gate"))
    y = down.forward(a.detach())
    grad_a, *of_down = down.backward(g * shares)
    (grad_h,) = torch.autograd.grad(a, h, grad_a)
    grad_x, *of_up = up.backward(grad_h)
    right = {"result": y * shares, "grad_input": grad_x}
    for name, (grad_w, grad_d) in {first: of_up, second: of_down}.items():
        right[f"grad_{name}"] = grad_w.mT if turned else grad_w
        if name in adapters:
            of_delta = grad_w if oracles[name].injection.lora == "merged" else grad_d
            right |= {f"grad_{name}_{k}": own for k, own in adapters[name].gradients(of_delta).items()}
    return right


def is_transposed(module: Any) -> bool:
    """Return whether a class stores [experts, in, out]: as transformers declares it, and Llama-4's."""
    return bool(getattr(module, "is_transposed", type(module).__name__.endswith(IN_BANDS)))


def _activated(module: Any, h: Tensor, *, gated: bool) -> Tensor:
    made: Tensor
    if not gated:
        made = module.act_fn(h)
    elif hasattr(module, "_apply_gate"):
        made = module._apply_gate(h)
    else:
        gate, up = h.chunk(2, -1)
        made = up * module.act_fn(gate)
    return made
