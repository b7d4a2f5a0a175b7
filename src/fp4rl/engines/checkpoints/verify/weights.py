"""Every tensor of a checkpoint against those of the policy: rounded ones, those that were left, all else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fp4rl.engines.checkpoints.export import ADAPTER
from fp4rl.engines.checkpoints.verify.causes import cause
from fp4rl.engines.checkpoints.verify.checkpoint import Checkpoint
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.engines.checkpoints.verify.trained import Trained
from fp4rl.models.packed.weight import StoredWeight
from fp4rl.models.shards import all_tensors
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E2M1, NVFP4, Format
from fp4rl.spec.words import counted

Said = Callable[[str, int, int], None]  # what is being done, how much of it is done, and all


@dataclass
class Weights:
    """Compares tensor by tensor; `checks` fill meanwhile. `trained_inputs`: what inputs are rounded to is known from a
    run or a record, and not by the mode alone that the checkpoint says of itself."""

    checkpoint: Checkpoint
    trained: Trained
    trained_inputs: bool = True
    weights: Check = field(default_factory=lambda: Check("weights"))
    sites: Check = field(default_factory=lambda: Check("sites"))
    inputs: Check = field(default_factory=lambda: Check("inputs"))
    others: Check = field(default_factory=lambda: Check("other tensors"))
    reordered: int = 0  # values whose codes and scales are those that were trained, under a layout that multiplies

    own_factors: int = 0  # static ones of inputs that there is nothing to compare with

    def checks(self, required: Mapping[str, object], said: Said) -> tuple[Check, ...]:
        """Compare all tensors; `required` are those of the unquantized files."""
        self.sites.count(rounded=0, left=0)
        names = list(dict.fromkeys([*required, *self.checkpoint.tensors]))
        for done, name in enumerate(names):
            self._compare(name)
            said("tensors compared", done + 1, len(names))
        if self.reordered:
            said_so = f"{self.reordered:,} values have other last bits, as code * (scale * weight_scale_2) is rounded"
            self.weights.notes.append(f"{said_so}; their codes and scales are those that were trained")
        if self.own_factors:
            layers = counted(self.own_factors, "layer")
            self.inputs.notes.append(f"{layers} with static factors of the checkpoint's own: a model folder has none")
        if self.checkpoint.method is None:
            self.inputs.notes.append("a checkpoint of plain weights says nothing of inputs, and engines round none")
        return self.weights, self.sites, self.inputs, self.others

    def _compare(self, name: str) -> None:
        plan = self.trained.plans.get(name)
        check = self.others if plan is None else self.weights
        if name not in self.checkpoint.tensors:
            check.count(tensors=1)
            check.differs(name, "is missing", tensors=1)
            return
        if name not in self.trained.values:
            check.count(tensors=1)
            check.differs(name, "is no tensor of the policy", tensors=1)
            return
        packed, fmt = self.checkpoint.packed(name), plan.weight if plan else None
        try:
            here = self.checkpoint.value(name, getattr(torch, self.trained.injection.dtype))
        except InvalidValueError as error:
            check.count(tensors=1)
            check.differs(name, f"cannot be read: {error}", tensors=1)
            return
        expected = self.trained.values[name]
        wrong = check.compare(name, here, expected)
        if wrong is not None and packed is not None and packed.divides_to(expected):
            self.reordered += int(wrong.sum())
            wrong = None
        if wrong is not None:
            why = cause(name, here, fmt, self.trained.values, lambda: self._masters)
            if name in self.trained.head and self._twice and not why:
                why = "it is the embedding in the model, and is written twice with different values"
            check.explain(name, here, expected, wrong, why)
        turned = plan is not None and bool(plan.site.transposed) and (here.ndim > 2 or plan.site.kind != "experts")
        self._site(name, fmt, packed, here.mT if turned else here, differs=wrong is not None)
        if plan is not None and packed is not None:
            self._input(name, plan.input, packed)

    @property
    def _twice(self) -> bool:
        return len(self.trained.head & self.checkpoint.tensors.keys()) > 1

    @cached_property
    def _masters(self) -> Mapping[str, Tensor]:
        return self.trained.masters()

    def _site(self, name: str, fmt: Format | None, packed: StoredWeight | None, here: Tensor, *, differs: bool) -> None:
        """Compare whether a weight is rounded, and to what, with the table of sites."""
        if here.ndim < 2:
            return
        self.sites.count(**{"rounded" if fmt else "left": 1})
        if fmt is None:
            if packed is not None:
                self.sites.differs(name, f"is packed as {_words(packed.fmt)}, but {self._reason(name)}", left=1)
            elif differs and off_grid(here, NVFP4) == 0:
                self.sites.differs(name, f"is rounded to 4 bits, but {self._reason(name)}", left=1)
            return
        if packed is not None:
            if _kind(packed.fmt) != _kind(fmt):
                self.sites.differs(
                    name, f"is packed as {_words(packed.fmt)}, but the policy has {_words(fmt)}", rounded=1
                )
        elif self.checkpoint.method is not None:
            dtype = str(here.dtype).removeprefix("torch.")
            self.sites.differs(name, f"is stored in {dtype}, but the policy has {_words(fmt)}", rounded=1)
        elif off := off_grid(here, fmt):
            how = f"{off:,} of its {here.numel():,} values lie off the grid of {_words(fmt)}, which the policy has"
            self.sites.differs(name, how, rounded=1)

    def _reason(self, name: str) -> str:
        module = name.removesuffix(".weight")
        left = next((left for left in self.trained.table.left_out if left.site.name == module), None)
        return f"was to be left as it is ({left.reason})" if left else "was to be left as it is"

    def _input(self, name: str, fmt: Format | None, packed: StoredWeight) -> None:
        self.inputs.count(layers=1)
        said = packed.unread_input or (_words(packed.input) if packed.input else "no format")
        trained = _words(fmt) if fmt else "no format"
        if packed.unread_input is not None or _kind(packed.input) != _kind(fmt):
            self.inputs.differs(name, f"inputs are said to have {said}, but the policy's have {trained}", layers=1)
        elif fmt and packed.input and not _as_calibrated(fmt, packed):
            if fmt.calibrated is None and not self.trained_inputs:
                self.own_factors += 1
                return
            own = f"up to {fmt.calibrated}" if fmt.calibrated else f"have one {fmt.factor}"
            how = f"its static factor is for inputs up to {packed.input.calibrated}, the policy's {own}"
            self.inputs.differs(name, how, layers=1)


def adapter(out: Path, folder: Path, check: Check) -> None:
    """Compare the adapter beside a packed base with that of the policy."""
    here, expected = all_tensors(out / ADAPTER), all_tensors(folder)
    for name in {**here, **expected}:
        if name not in here or name not in expected:
            check.count(tensors=1)
            check.differs(f"{ADAPTER}/{name}", f"is {'missing' if name in expected else 'not part of it'}", tensors=1)
            continue
        values = here[name].read(), expected[name].read()
        if (wrong := check.compare(name, *values)) is not None:
            check.explain(f"{ADAPTER}/{name}", *values, wrong, "")


def off_grid(values: Tensor, fmt: Format) -> int:
    """Return how many values [..., out, in] cannot be of a format, whatever its scales are.

    Under powers of two a value has the element's digits; under other scales a block has as many magnitudes as codes.
    """
    if fmt.scale == "e8m0" and not fmt.coarse and not fmt.rotation:
        steps = torch.frexp(values.float()).mantissa * 2.0 ** (fmt.element.mantissa_bits + 1)
        return int((steps != steps.round()).sum())
    if fmt.element.bits != E2M1.bits or fmt.block is None or fmt.rotation or values.shape[-1] % fmt.block[1]:
        return 0  # as many codes as values in a block: they tell nothing
    blocks = torch.unflatten(values.float().abs(), -1, (-1, fmt.block[1])).sort(-1).values
    different = 1 + (blocks.diff(dim=-1) > 0).sum(-1)
    return int((different - 2 ** (E2M1.bits - 1)).clamp(min=0).sum())


def _as_calibrated(fmt: Format, packed: StoredWeight) -> bool:
    """Return whether a static factor is the trained one, which several magnitudes have; a layout that multiplies may
    lack the very reciprocal."""
    magnitudes = fmt.calibrated, packed.input.calibrated if packed.input else None
    if None in magnitudes or fmt.scale != "e4m3":
        return magnitudes[0] == magnitudes[1]
    trained, said = (nvfp4_global(torch.tensor(each), fmt.element) for each in magnitudes)
    near = 4 * torch.finfo(torch.float32).eps if packed.multiplier else 0.0
    return bool((trained / said - 1).abs() <= near)


def _kind(fmt: Format | None) -> tuple[object, ...]:
    return (fmt.element.name, fmt.block and fmt.block[1], fmt.scale, bool(fmt.coarse), fmt.fallback) if fmt else ()


def _words(fmt: Format) -> str:
    return fmt.name + (f" with a fallback of {fmt.fallback:g}" if fmt.fallback else "")
