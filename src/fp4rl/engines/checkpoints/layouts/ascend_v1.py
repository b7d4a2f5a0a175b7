"""AscendV1, which vLLM-Ascend loads: files, types and their order as msModelSlim 26.1 writes them.

A layer P has P.weight (4-bit codes, two a byte, or E4M3), P.weight_scale (exponent + 127), under a dual scale
P.weight_dual_scale, and P.bias in float32; all other tensors are FLOAT and stay as they are, a tied head as a copy of
the embedding. `quant_model_description.json` names the type of every one.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, ClassVar

import torch

from fp4rl.engines.checkpoints.layouts.layout import (
    Layout,
    Named,
    Stored,
    as_text,
    config_of,
    kind_of,
    require_computed,
    require_formats,
    require_fused,
    require_matrices,
    row_scales,
)
from fp4rl.engines.checkpoints.policy import Entry, Policy
from fp4rl.inject.plan import SitePlan
from fp4rl.lab.serving import unserved
from fp4rl.models.load import names_in_memory
from fp4rl.models.packed.ascend_v1 import DESCRIPTION, PLAIN, TYPES
from fp4rl.numerics.packing import Packed
from fp4rl.sites.walk import plain_name
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, MXFP4_DUAL, MXFP8, Format
from fp4rl.spec.injection import Injection

_DUAL = "W4A4_MXFP4_DUALSCALE"
# From the highest number of bits to the lowest: the last one that is there is the model's type. -> a mode of its own
_MODES = {"W8A8_MXFP8": "w8a8", "W4A16_MXFP4": "w4a16", "W4A8_MXFP": "w4a8", "W4A4_MXFP4": "w4a4", _DUAL: "w4a4"}
_IN_AN_EXPERT = ("gate_proj", "up_proj", "down_proj")


class AscendV1(Layout):
    """MXFP4 and MXFP8 for vLLM-Ascend."""

    name: ClassVar[str] = "ascend_v1"
    deployment: ClassVar[str] = "vllm_ascend"
    stem: ClassVar[str] = "quant_model_weights"
    index: ClassVar[str] = "quant_model_weights.safetensors.index.json"
    always_sharded: ClassVar[bool] = True
    metadata: ClassVar[dict[str, str] | None] = None

    def unserved(self, policy: Policy) -> Iterator[str]:
        """Yield what vLLM-Ascend has no kernel for, type by type, and a deployment on other hardware."""
        deployment = DEPLOYMENTS.get(policy.injection.deployment or "vllm_ascend")
        if deployment is not None and "Ascend" not in deployment.kernel.hardware:
            yield (
                f"deployment {deployment.name} computes on {deployment.kernel.hardware}, but {self.name} is loaded by "
                "vLLM-Ascend alone; take --deployment vllm_ascend"
            )
        of_type: dict[str, list[tuple[str, str, int]]] = {}
        for entry in policy.rounded:
            assert entry.plan is not None
            of_type.setdefault(type_of(entry.plan), []).append((entry.module, entry.plan.site.part, entry.shape[-1]))
        for kind, layers in of_type.items():
            for why in unserved(Injection.named(_MODES[kind], self.deployment), layers):
                yield f"{why}; W4A4 and W8A8 have kernels for all layers; or leave them out: injection.targets.leave"

    def require(self, policy: Policy) -> None:
        """Raise InvalidValueError for other formats, and for layers that are fused when they are served and differ."""
        require_matrices(policy, self.name)
        require_formats(policy, (MXFP4, MXFP4_DUAL, MXFP8), self.name)
        require_computed(policy)
        require_fused(policy, type_of, PLAIN)

    def entries(self, policy: Policy) -> tuple[Entry, ...]:
        """Return the entries as the modules of the model come, decoder layers first, and a copy for a tied head."""
        memory = names_in_memory(policy.base, [entry.name for entry in policy.entries])
        by_name = {memory[entry.name]: entry for entry in policy.entries}
        known, last = _order(policy.base), count()
        head, embedding = f"{policy.head}.weight", f"{policy.embedding}.weight"
        if policy.tied and head not in by_name and embedding in by_name:
            by_name[head] = replace(by_name[embedding], name=head)
        order = {name: (*_number(name, known), next(last)) for name in by_name}
        return tuple(by_name[name] for name in sorted(by_name, key=order.__getitem__))

    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield codes and scales, or the tensor as it is; the bias of a rounded layer in float32."""
        if entry.weight is None:
            value = policy.value(entry)
            yield entry.name, value.float() if entry.name.endswith(".bias") and entry.module in policy.layers else value
            return
        made = policy.packed(entry)
        yield entry.name, made.data if isinstance(made, Packed) else made.codes.view(torch.float8_e4m3fn)
        yield f"{entry.name}_scale", row_scales(made)
        if made.levels.coarse is not None:
            yield f"{entry.name}_dual_scale", made.levels.coarse.float()

    def texts(self, policy: Policy, stored: Stored) -> Mapping[str, str]:
        """Return config.json, and the type of every tensor in their order."""
        types = {name: _type_of_tensor(policy, name) for names in stored.files.values() for name in names}
        present = set(types.values())
        model_type = [kind for kind in _MODES if kind in present][-1]
        about = {"version": "1.0.0", "model_quant_type": model_type, "metadata": {}, "group_size": 32, "optional": {}}
        return {"config.json": as_text(config_of(policy)), DESCRIPTION: json.dumps(types | about, indent=4)}


def type_of(plan: SitePlan) -> str:
    """Return the type of a layer; raises InvalidValueError where AscendV1 has none for its formats."""
    pair = _kinds(plan.weight, plan.input)
    for name, formats in TYPES.items():
        if pair == _kinds(*formats):
            return name
    if plan.weight is None:
        return PLAIN
    weight, given = (
        f"{fmt.name} under dual scales" if fmt and fmt.coarse else fmt.name if fmt else "unrounded"
        for fmt in (plan.weight, plan.input)
    )
    raise InvalidValueError(
        f"{plan.name} has {weight} (weight) and {given} (input), for which AscendV1 has no type; it has "
        f"{', '.join(TYPES)}"
    )


def _kinds(*formats: Format | None) -> list[object]:
    return [None if fmt is None else kind_of(fmt) for fmt in formats]


def _type_of_tensor(policy: Policy, name: str) -> str:
    """Return the type of a stored tensor; a bias has its layer's under a dual scale alone, as msModelSlim has it."""
    module, _, own = name.rpartition(".")
    entry = policy.layers.get(module)
    if entry is None or entry.plan is None or not own.startswith(("weight", "bias")):
        return PLAIN
    kind = type_of(entry.plan)
    return PLAIN if own == "bias" and kind != _DUAL else kind


def _order(model: Any) -> dict[str, tuple[int, int, int]]:
    """Return numbers of every module and parameter: outside a decoder layer, number of its module, its own."""
    order: dict[str, tuple[int, int, int]] = {}
    layers: tuple[str, ...] = ()
    for number, (path, module) in enumerate(model.named_modules()):
        if "decoderlayer" in type(module).__name__.lower():
            layers = (*layers, f"{path}.")
        outside = not f"{path}.".startswith(layers) if layers else True
        own = [name for name, _ in module.named_parameters(recurse=False)]
        for last, name in enumerate([*own, ""]):
            order.setdefault(plain_name(f"{path}.{name}".strip(".")), (outside, number, last))
    return order


def _number(name: str, known: Mapping[str, tuple[int, int, int]]) -> tuple[int, ...]:
    """Return the numbers of a tensor; experts, which the files hold one by one, stand where their stack does."""
    held, inside = name, ""
    while held not in known and held:
        held, _, part = held.rpartition(".")
        inside = f"{part}.{inside}"
    expert, _, rest = inside.partition(".")
    matrix = rest.partition(".")[0]
    own = _IN_AN_EXPERT.index(matrix) if matrix in _IN_AN_EXPERT else 0
    return (*known[held], int(expert) if expert.isdigit() else 0, own)
