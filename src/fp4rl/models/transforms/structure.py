"""What a transform must know of a model: which linear layers read which norm, and which write into the residual stream.

It is seen in a forward of a few tokens, by the tensors that modules hand on, not by the names of architectures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fp4rl.sites.modalities import text_modules
from fp4rl.sites.observe import first_tensor, hooked
from fp4rl.sites.walk import Site, walk
from fp4rl.spec.errors import InvalidValueError

_READ = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "lm_head")
_WRITE = ("o", "down")
_TOKENS = 8
_RMS_TOLERANCE = 1e-3  # of a norm's own arithmetic, which may be in bfloat16

Seen = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Heads:
    """One attention's way from values to the residual stream: `v` [kv_heads * width, in], `o` [out, heads * width]."""

    v: nn.Linear
    o: nn.Linear
    o_path: str
    width: int

    @property
    def kv_heads(self) -> int:
        """How many heads `v` makes; each is read by `o` once for every query head that shares it."""
        return self.v.out_features // self.width

    def by_head(self, columns: Tensor) -> Tensor:
        """Return `o`'s inputs [..., heads * width] as [..., kv_heads, queries that share it, width]."""
        return columns.reshape(*columns.shape[:-1], self.kv_heads, -1, self.width)


@dataclass(frozen=True)
class Structure:
    """A decoder whose every weight has a known part. `readers`: norm's path -> the linear layers that read its output;
    `writers` add to the residual stream; `sites` are all linear layers."""

    model: nn.Module
    readers: Mapping[str, tuple[Site, ...]]
    writers: tuple[Site, ...]
    sites: tuple[Site, ...]

    def linear(self, site: Site) -> nn.Linear:
        """Return the module of a site."""
        module = self.model.get_submodule(site.path)
        assert isinstance(module, nn.Linear)
        return module

    def heads(self) -> Iterator[Heads]:
        """Yield every attention's values and their reader. Raises InvalidValueError where there is no `v_proj`."""
        for o in (site for site in self.writers if site.role == "o"):
            v = self._beside(o, "v", "its values come out of one matrix with queries and keys")
            attention: Any = self.model.get_submodule(o.path.rpartition(".")[0])
            heads = Heads(self.linear(v), self.linear(o), o.path, getattr(attention, "head_dim", 0))
            if not heads.width or heads.v.out_features % heads.width or heads.o.in_features % heads.v.out_features:
                _refuse(self.model, f"{o.name} does not read whole heads of {v.name}")
            yield heads

    def gated(self) -> Iterator[tuple[nn.Linear, nn.Linear, str]]:
        """Yield `up_proj`, `down_proj` and the path of the latter, where a gate multiplies between the two."""
        for down in (site for site in self.writers if site.role == "down"):
            up = self._beside(down, "up", "the gate comes out of the same matrix")
            self._beside(down, "gate", "there is no gate, so that what lies before it is not linear")
            yield self.linear(up), self.linear(down), down.path

    def _beside(self, site: Site, role: str, why: str) -> Site:
        beside = [other for other in self.sites if (other.parent, other.role) == (site.parent, role)]
        if len(beside) != 1:
            _refuse(self.model, f"{site.name} has no {role}_proj beside it: {why}")
        return beside[0]


@torch.no_grad()
def structure_of(model: Any) -> Structure:
    """Return what a forward of a causal model shows. Raises InvalidValueError where a weight has no known part."""
    if text_modules(model) is not None:
        _refuse(model, "what it sees or hears enters the residual stream too")
    every = [site for site in walk(model) if site.kind != "attention"]
    linear, norms = (tuple(site for site in every if site.kind == kind) for kind in ("linear", "norm"))
    for site in every:
        _require_known(model, site)
    if sum(site.kind == "embedding" for site in every) != 1:
        _refuse(model, "it has more than one embedding, such as learned positions")
    seen = _seen(model, [site.path for site in (*linear, *norms)])
    for site in (*linear, *norms):
        if site.path not in seen:
            _refuse(model, f"{site.name} was not called with a tensor")
    made = {_memory(seen[norm.path][1]): norm.path for norm in norms}
    read = {site.path: made.get(_memory(seen[site.path][0])) for site in linear}
    for site in linear:
        _require_use(model, site, read[site.path])
    readers = {norm.path: tuple(s for s in linear if read[s.path] == norm.path) for norm in norms}
    inside = {_memory(seen[site.path][1]) for site in linear if site.role in ("q", "k")}
    for norm in norms:
        given, out = seen[norm.path]
        if readers[norm.path]:
            _require_rms(model, norm, given, out)
        elif _memory(given) not in inside:
            _refuse(model, f"{norm.name} normalizes what no linear layer reads")
    return Structure(
        model, {path: own for path, own in readers.items() if own}, tuple(s for s in linear if s.role in _WRITE), linear
    )


def _require_known(model: nn.Module, site: Site) -> None:
    if site.kind not in ("linear", "norm", "embedding") or site.transposed:
        _refuse(model, f"it has {site.name} ({site.kind})")
    if site.also or (site.shares is not None and site.role != "lm_head"):
        _refuse(model, f"{site.name} shares its weight with {site.shares or site.also[0]}")


def _require_use(model: nn.Module, site: Site, norm: str | None) -> None:
    if site.role not in (*_READ, *_WRITE):
        _refuse(model, f"the part of {site.name} is not known")
    if (norm is not None) != (site.role in _READ):
        _refuse(model, f"{site.name} reads {'what no norm has made' if norm is None else norm}")


def _require_rms(model: nn.Module, norm: Site, given: Tensor, out: Tensor) -> None:
    """Raise InvalidValueError unless the norm gives x / rms(x) * weight: no mean, no bias, no 1 + weight."""
    module: Any = model.get_submodule(norm.path)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
    x = given.float()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * module.weight.float()
    if not torch.allclose(
        out.float(), expected, rtol=_RMS_TOLERANCE, atol=_RMS_TOLERANCE * float(expected.abs().max())
    ):
        _refuse(model, f"{norm.name} is not x / rms(x) * weight")


def _seen(model: Any, paths: list[str]) -> Seen:
    """Return path -> the first tensor that each module took and the first that it gave; all are kept alive."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def look(path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = first_tensor(args) if args else first_tensor(tuple(kwargs.values()))
            made = first_tensor(output)
            if given is not None and made is not None:
                seen[path] = given, made

        return hook

    vocabulary = model.get_input_embeddings().weight
    ids = torch.arange(1, _TOKENS + 1, device=vocabulary.device).remainder(len(vocabulary)).unsqueeze(0)
    with hooked(model, {path: look(path) for path in paths}):
        model(input_ids=ids, use_cache=False)
    return seen


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _refuse(model: nn.Module, why: str) -> NoReturn:
    raise InvalidValueError(
        f"model.transforms: the structure of {type(model).__name__} is not known here: {why}; leave transforms out"
    )
