"""What a layout decides, and what all of them share."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4rl.engines.checkpoints.policy import Entry, Policy
from fp4rl.inject.plan import SitePlan
from fp4rl.lab.serving import served_as, unserved
from fp4rl.numerics.packing import Packed, Quantized
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E2M1, Format, describe
from fp4rl.spec.injection import Injection

Named = tuple[str, Tensor]
_GIB = 1 << 30


@dataclass(frozen=True)
class Stored:
    """What was written: the tensors of each file in the order they were given, and the bytes of all."""

    files: Mapping[str, tuple[str, ...]] = field(repr=False)
    bytes: int = 0

    @property
    def file_of(self) -> dict[str, str]:
        """The file of each tensor."""
        return {name: file for file, names in self.files.items() for name in names}


class Layout(ABC):
    """How a policy is stored. A layout is a class with a name; `tensors` is called once for each entry, in order."""

    name: ClassVar[str]
    mode: ClassVar[str] = "w4a8"  # of a model folder, where none is named
    deployment: ClassVar[str]  # likewise
    stem: ClassVar[str] = "model"  # of the files with weights
    index: ClassVar[str] = "model.safetensors.index.json"
    always_sharded: ClassVar[bool] = False  # a number in the name, and an index, also where there is one file
    file_bytes: ClassVar[int] = 4 * _GIB  # another file is begun before these are reached
    metadata: ClassVar[dict[str, str] | None] = {"format": "pt"}  # in the header of each file

    def deployed(self, injection: Injection) -> Injection:
        """Return what of an injection is computed by whatever loads this layout."""
        return injection

    def served(self, policy: Policy) -> str:
        """Return what it is computed as, and where, in one sentence."""
        return served_as(policy.injection)

    def notes(self, _: Policy) -> Iterator[str]:
        """Yield what engines change beyond that."""
        return iter(())

    def unserved(self, policy: Policy) -> Iterator[str]:
        """Yield what the deployment has no kernel for, and what it has."""
        injection = policy.injection
        mode, deployment = injection.checkpoint_mode, DEPLOYMENTS.get(injection.deployment or "")
        if deployment is not None and mode is not None and deployment.changes(mode):
            as_they_are = [name for name in deployment.kernel.serves if not deployment.changes(name)]
            yield f"{deployment.sentence(mode)}; {deployment.name} serves {', '.join(as_they_are)} as they are"
        four_bits = [entry for entry in policy.rounded if entry.weight and entry.weight.element == E2M1]
        yield from unserved(injection, [(e.module, e.plan.site.part, e.shape[-1]) for e in four_bits if e.plan])

    def computed_otherwise(self, _: Policy) -> Iterator[str]:
        """Yield which numbers of a run whatever loads this layout does not compute with."""
        return iter(())

    @abstractmethod
    def require(self, policy: Policy) -> None:
        """Raise InvalidValueError, with the cure, for a policy that this layout, or what loads it, cannot hold."""

    def entries(self, policy: Policy) -> Iterable[Entry]:
        """Return the entries in the order in which they are written."""
        return policy.entries

    @abstractmethod
    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield what is stored of an entry."""

    @abstractmethod
    def texts(self, policy: Policy, stored: Stored) -> Mapping[str, str]:
        """Return the files beside the weights by name: config.json, and what describes the tensors."""


def config_of(policy: Policy) -> dict[str, Any]:
    """Return config.json of the folder with the weights, without what it says of their own quantization."""
    config: dict[str, Any] = json.loads((policy.folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    return config


def as_text(content: Mapping[str, Any]) -> str:
    """Return JSON as transformers writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def row_scales(made: Packed | Quantized) -> Tensor:
    """Return one scale for each block of a row [out, blocks]: those of tiles are repeated for their rows."""
    block = made.levels.fmt.block
    if block is None or block[0] == 1:
        return made.scales
    rows = (made.data if isinstance(made, Packed) else made.codes).shape[0]
    repeated = made.scales.view(torch.uint8).repeat_interleave(block[0], 0)[:rows]
    return repeated.contiguous().view(made.scales.dtype)


def require_matrices(policy: Policy, layout: str) -> None:
    """Raise InvalidValueError for a weight that is no matrix [out, in] of its own in the files."""
    for entry in policy.rounded:
        if entry.stacked or entry.turned:
            what = "stacks its experts" if entry.stacked else "is stored [in, out] (Conv1D)"
            raise InvalidValueError(f"{entry.name} {what}, and nothing loads it packed as {layout}; take --to bf16")


def require_computed(policy: Policy) -> None:
    """Raise InvalidValueError where outputs of layers are rounded, or inputs twice, which no engine does."""
    for entry in policy.rounded:
        if entry.plan is not None and entry.plan.output is not None:
            raise InvalidValueError(f"{entry.module}: outputs are rounded, which no engine does; take `output: none`")
        if entry.input is not None and entry.input.fallback is not None:
            raise InvalidValueError(
                f"{entry.module}: inputs in {describe(entry.input)} are rounded twice, which no engine does; train "
                "without fallback, or take --to bf16 for the weights alone"
            )


def require_fused(policy: Policy, type_of: Callable[[SitePlan], str], plain: str) -> None:
    """Raise InvalidValueError where what engines load in one type has several: q/k/v, gate/up, experts of a layer.

    `type_of` says the type of a layer that is rounded, and `plain` is that of one that is left.
    """
    table, groups = policy.table, dict[str, dict[str, str]]()
    types = [(plan.site, type_of(plan)) for plan in table.plans if plan.site.kind in ("linear", "experts")]
    for site, kind in types + [(left.site, plain) for left in table.left_out]:
        experts = f"{site.name.partition('.experts.')[0]}.experts" if site.part == "experts" else None
        if (group := experts or site.fused_group) is not None:
            groups.setdefault(group, {}).setdefault(kind, site.name)
    for group, members in groups.items():
        if len(members) > 1:
            said = ", ".join(f"{name} is {kind}" for kind, name in members.items())
            raise InvalidValueError(
                f"engines load {group} in one type alone, but {said}; give them one format, or leave all of them out"
            )


def factors_apart(policy: Policy) -> Iterator[str]:
    """Yield where NVFP4 weights have factors of their own in a matrix that is served with one."""
    for entry in policy.rounded:
        nested = entry.weight is not None and entry.weight.scale == "e4m3" and not entry.beside
        if nested and entry.plan and entry.plan.site.fused_group:
            yield f"{entry.module} has an NVFP4 factor of its own, but vLLM applies one to a fused matrix"
            return


def kind_of(fmt: Format) -> tuple[object, ...]:
    """Return what of a format a type of tensor fixes. Rules, rounding and rows of a block are free."""
    return fmt.element, fmt.scale, fmt.block and fmt.block[1], fmt.coarse is not None, fmt.rotation


def require_formats(policy: Policy, known: Iterable[Format], layout: str) -> None:
    """Raise InvalidValueError for weights of another kind than those formats."""
    kinds = {kind_of(fmt): fmt.name for fmt in known}
    for entry in policy.rounded:
        fmt = entry.weight
        assert fmt is not None
        if kind_of(fmt) not in kinds:
            raise InvalidValueError(
                f"{entry.name} is rounded to {describe(fmt)}, for which {layout} has no type; it has "
                f"{', '.join(kinds.values())}, in blocks of their own width, without rotation; --to bf16 holds any "
                "rounded values"
            )
    require_whole_blocks(policy, layout)


def require_whole_blocks(policy: Policy, layout: str) -> None:
    """Raise InvalidValueError for rows that are no whole number of blocks."""
    for entry in policy.rounded:
        fmt = entry.weight
        if fmt and fmt.block and entry.shape[-1] % fmt.block[1]:
            raise InvalidValueError(
                f"{entry.name}: in_features {entry.shape[-1]} is no multiple of {fmt.block[1]}, which {layout} needs; "
                f"leave it out (injection.targets.leave=['{entry.module}']), or take --to bf16"
            )
