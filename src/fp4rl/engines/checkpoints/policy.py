"""The policy that is exported: every tensor of the unquantized checkpoint, and how it is rounded, one at a time.

The model is never loaded: its modules stand on the meta device, and a tensor is read, rounded and let go.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from fp4rl.inject.adapted import AdaptedSum, adapter_of
from fp4rl.inject.faults import SiteRng
from fp4rl.inject.fused import with_largest
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import base_of, names_in_memory, skeleton
from fp4rl.models.packed.folder import opened
from fp4rl.models.shards import StoredTensor, all_tensors
from fp4rl.models.site_tensors import tensors_of
from fp4rl.numerics.packing import Packed, Quantized, pack_tensor, quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.sites.walk import plain_name
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection

_A_OR_B = re.compile(r"(\.lora_[AB])\.weight$")


@dataclass(frozen=True)
class Entry:
    """One tensor of the unquantized checkpoint, under its name in the files. `plan` is None where nothing rounds it.

    `beside` are others that share its factor. Of stacked experts in one tensor every matrix is rounded by itself.
    """

    name: str
    stored: StoredTensor
    plan: SitePlan | None = None
    beside: tuple["Entry", ...] = ()

    @property
    def weight(self) -> Format | None:
        """The format of the weight; None where it stays as it is."""
        return self.plan.weight if self.plan else None

    @property
    def input(self) -> Format | None:
        """The format of the input of its matmul."""
        return self.plan.input if self.plan else None

    @property
    def module(self) -> str:
        """The name of the layer that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def stacked(self) -> bool:
        """Whether it holds a matrix for each of several experts."""
        return self.plan is not None and len(self.stored.shape) == 3

    @property
    def turned(self) -> bool:
        """Whether it is stored [..., in, out]."""
        turned = self.plan is not None and bool(self.plan.site.transposed)
        return turned and (self.stacked or self.plan.site.kind != "experts")  # type: ignore[union-attr]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape as [..., out, in]."""
        *leading, rows, columns = self.stored.shape
        return (*leading, columns, rows) if self.turned else self.stored.shape


@dataclass(frozen=True)
class Policy:
    """A model folder under an injection. `start` is the folder that was named, `folder` that of the weights.

    They differ for an adapter. `entries` stand in the order of the files, which leave out a head that is tied to the
    embedding. `table` is what `attach` would do to the model.
    """

    start: Path
    folder: Path
    injection: Injection
    model: nn.Module = field(repr=False)
    table: SiteTable = field(repr=False)
    entries: tuple[Entry, ...] = field(repr=False)

    @classmethod
    def of(cls, start: Path, injection: Injection) -> "Policy":
        """Read what a folder holds, but no weights; raises what `skeleton`, `all_tensors` and `resolve` do."""
        model: Any = skeleton(start)
        folder = base_of(start) or start
        if (packed := opened(folder)) is not None:
            raise InvalidValueError(f"{folder}: its weights are packed already ({packed.method}); export their source")
        if folder != start and injection.lora == "merged":
            _fill_adapter(model, start)
        table = resolve(model, injection.model_copy(update={"frozen_base": "copy"}))
        return cls(start, folder, injection, model, table, tuple(_entries(model, table, folder)))

    @property
    def rounded(self) -> tuple[Entry, ...]:
        """The entries that are rounded."""
        return tuple(entry for entry in self.entries if entry.weight is not None)

    @cached_property
    def layers(self) -> dict[str, Entry]:
        """The rounded entries by the layer that holds them."""
        return {entry.module: entry for entry in self.rounded}

    @property
    def base(self) -> Any:
        """The model without what an adapter puts around it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def head(self) -> str:
        """The name of the head; empty where there is none."""
        return self._named(self.base.get_output_embeddings())

    @property
    def embedding(self) -> str:
        """The name of the embedding of inputs."""
        return self._named(self.base.get_input_embeddings())

    def _named(self, meant: nn.Module | None) -> str:
        return next((plain_name(path) for path, module in self.base.named_modules() if module is meant), "")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        head, embedding = self.base.get_output_embeddings(), self.base.get_input_embeddings()
        return head is not None and head.weight is embedding.weight

    def value(self, entry: Entry) -> Tensor:
        """Return the master as stored, with the adapter in it where the sum is what is deployed."""
        master = entry.stored.read()
        if entry.plan is None or not entry.plan.merged:
            return master
        adapted = AdaptedSum(adapter_of(self.model, entry.plan.site))
        adapted.sources = (master, *adapted.sources[1:])
        return adapted.weight.detach()

    def packed(self, entry: Entry) -> Packed | Quantized:
        """Return codes and scales of a matrix [out, in], bit for bit those that the run computed with.

        Elements of 4 bits are packed two a byte. Raises InvalidValueError for NaN, with the tensor's name.
        """
        fmt, given = entry.weight, self._to_round(entry)
        assert fmt is not None
        make = pack_tensor if fmt.element.bits == 4 else quantize
        made = make(given, fmt, generator=self._generator(entry), name=entry.name)
        return made if len(given) == entry.shape[0] else _without_last_row(made)

    def baked(self, entry: Entry) -> Tensor:
        """Return the rounded values, as the tensor is stored and in its dtype: those that the run computed with."""
        fmt, given = entry.weight, self._to_round(entry)
        assert fmt is not None
        generator = self._generator(entry)
        matrices = given.unbind(0) if entry.stacked else (given,)
        rounded = [fake_quantize(m.contiguous(), fmt, generator=generator, name=entry.name) for m in matrices]
        values = torch.stack(rounded) if entry.stacked else rounded[0][: entry.shape[0]]
        return (values.mT if entry.turned else values).to(entry.stored.dtype).contiguous()

    def _to_round(self, entry: Entry) -> Tensor:
        """Return the master as [..., out, in] in the dtype that is rounded.

        Where a factor is shared, a row below it has the largest magnitude of all who share it.
        """
        master = self.value(entry)
        master = (master.mT if entry.turned else master).to(getattr(torch, self.injection.dtype))
        if not entry.beside:
            return master.contiguous()
        largest = max(float(self.value(other).abs().max()) for other in (entry, *entry.beside))
        return with_largest(master, torch.tensor(largest))

    def _generator(self, entry: Entry) -> torch.Generator | None:
        if entry.plan is None or entry.weight is None or entry.weight.rounding != "stochastic":
            return None
        if entry.plan.site.kind == "experts":
            raise InvalidValueError(
                f"{entry.name}: experts that are rounded stochastically share one draw; take {NEAR}"
            )
        seed = crc32(f"{self.injection.seed}/{entry.plan.name}".encode())
        return SiteRng(seed).fixed(torch.device("cpu"), "weight")


NEAR = "rounding: nearest_even"


def _fill_adapter(model: Any, folder: Path) -> None:
    """Give the adapter's A and B, which are on the meta device, the values in its folder."""
    from peft import load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    more = [name for name in saved if not _A_OR_B.search(name)]
    if more:
        raise InvalidValueError(
            f"{folder}: {more[0]!r} is no part of a plain adapter; merge it (merge_and_unload), save"
        )
    model.load_state_dict(
        {_A_OR_B.sub(r"\1.default.weight", name): tensor for name, tensor in saved.items()}, strict=False, assign=True
    )


def _without_last_row(made: Packed | Quantized) -> Packed | Quantized:
    if isinstance(made, Packed):
        return replace(made, data=made.data[:-1], scales=made.scales[:-1])
    return replace(made, codes=made.codes[:-1], scales=made.scales[:-1])


def _entries(model: Any, table: SiteTable, folder: Path) -> Iterator[Entry]:
    """Yield an entry for each stored tensor, in the order of the files."""
    stored = all_tensors(folder)
    names = names_in_memory(getattr(model, "get_base_model", lambda: model)(), stored)
    in_memory = {names[name]: tensor for name, tensor in stored.items()}
    rounded = dict[str, Entry]()
    for plan in (plan for plan in table.plans if plan.weight is not None):
        _require_exportable(plan)
        for matrix in tensors_of(plan.site, in_memory, folder):
            own = [Entry(tensor.name, tensor, plan) for tensor in matrix]
            has_factor = plan.weight is not None and plan.weight.scale == "e4m3"
            rounded |= _sharing(own) if has_factor else {entry.name: entry for entry in own}
    groups: dict[object, list[Entry]] = defaultdict(list)
    for entry in rounded.values():
        if entry.plan and entry.plan.site.kind == "linear" and entry.weight and entry.weight.factor == "fused":
            groups[entry.plan.site.fused_group or entry.name, entry.weight].append(entry)
    for group in groups.values():
        rounded |= _sharing(group)
    for name, tensor in stored.items():
        yield rounded.get(name, Entry(name, tensor))


def _sharing(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Return the entries by name, each with the others beside it."""
    all_of = list(entries)
    return {e.name: replace(e, beside=tuple(other for other in all_of if other is not e)) for e in all_of}


def _require_exportable(plan: SitePlan) -> None:
    if plan.merged and plan.site.kind == "experts":
        raise InvalidValueError(
            f"{plan.name}: an adapter on stacked experts is not merged tensor by tensor; merge it (merge_and_unload), "
            "save, and export that folder"
        )
