"""compressed-tensors, which vLLM and transformers load: `mxfp4-pack-quantized`, `nvfp4-pack-quantized`,
`mxfp8-quantized`, and several of them in one model (`mixed-precision`).

Of a layer P: `P.weight_packed` [out, in / 2] uint8 with the even column in the low nibble, `P.weight_scale` [out, in /
block], and with NVFP4 `P.weight_global_scale` [1], the number that block scales were multiplied by. MXFP8 keeps
`P.weight`, as float8_e4m3fn. Written as compressed-tensors 0.20 does, without it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from fp4rl.engines.checkpoints.layouts.layout import (
    Layout,
    Named,
    Stored,
    as_text,
    config_of,
    factors_apart,
    kind_of,
    require_computed,
    require_formats,
    require_fused,
    require_matrices,
    row_scales,
)
from fp4rl.engines.checkpoints.policy import Entry, Policy
from fp4rl.inject.plan import SitePlan
from fp4rl.models.load import names_in_memory
from fp4rl.numerics.packing import Packed
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, MXFP8, NVFP4, Format, describe

VERSION = "0.20.0"  # of compressed-tensors, whose keys these are
KINDS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}
_FORMATS = (MXFP4, NVFP4, MXFP8)
_NAMES = {kind_of(fmt): fmt.name for fmt in _FORMATS}  # what a format is called here
_INPUTS = {"mxfp4": ("mxfp4", "mxfp8"), "nvfp4": ("nvfp4",), "mxfp8": ("mxfp8",)}  # of each weight, beside none
_EXPERT = re.compile(r"(?:.*?\b(?=layers\.\d))?(.*\.experts)\.\d+\.")  # without what stands before its layers


class CompressedTensors(Layout):
    """Codes of two a byte and their scales, and a `quantization_config` that says which layers have which."""

    name: ClassVar[str] = "compressed_tensors"
    deployment: ClassVar[str] = "compressed_tensors"

    def require(self, policy: Policy) -> None:
        """Raise InvalidValueError, with the cure, for what no scheme says or its engines do not compute."""
        require_matrices(policy, self.name)
        require_computed(policy)
        require_formats(policy, _FORMATS, self.name)
        for entry in policy.rounded:
            _require_scheme(entry)
        require_fused(policy, _words, "left")

    def notes(self, policy: Policy) -> Iterator[str]:
        """Yield what engines change beyond the deployment's rules."""
        casts = {str(entry.stored.dtype).removeprefix("torch.") for entry in policy.entries} - {"bfloat16"}
        if casts:
            stored = " and ".join(sorted(casts))
            yield f"engines compute in bfloat16 and cast to it what is stored in {stored}, so that answers may change"
        if any(entry.input for entry in _experts(policy)):
            yield "transformers 5 leaves the inputs of experts as they are"
        yield from _lost_in_transformers(policy)

    def unserved(self, policy: Policy) -> Iterator[str]:
        """Yield also what engines decode to other NVFP4 weights, and what is lost in transformers, which is the
        deployment of this layout's name."""
        yield from super().unserved(policy)
        yield from factors_apart(policy)
        dtype = policy.injection.dtype
        if dtype != "bfloat16" and any(_kind(entry.weight) == "nvfp4" for entry in policy.rounded):
            yield (
                f"NVFP4 weights are rounded in {dtype}, and engines decode them to bfloat16, which are other numbers; "
                "add injection.dtype=bfloat16"
            )
        if policy.injection.deployment == self.deployment:
            yield from (f"{why}; name vLLM's hardware (--deployment)" for why in _lost_in_transformers(policy))

    def computed_otherwise(self, policy: Policy) -> Iterator[str]:
        """Yield that engines round inputs in bfloat16."""
        dtype = policy.injection.dtype
        if dtype != "bfloat16" and any(entry.input for entry in policy.rounded):
            yield f"inputs were rounded in {dtype}, and engines round them in bfloat16; train with dtype: bfloat16"

    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield codes, scales and factors of a rounded weight; any other tensor as it is."""
        if entry.weight is None:
            yield entry.name, policy.value(entry)
            return
        made, module = policy.packed(entry), entry.module
        if isinstance(made, Packed):
            yield f"{module}.weight_packed", made.data
        else:
            yield f"{module}.weight", made.codes.view(torch.float8_e4m3fn)
        yield f"{module}.weight_scale", row_scales(made)
        if made.factor is not None:
            yield f"{module}.weight_global_scale", made.factor.reshape(1)
        if entry.input is not None and entry.input.calibrated is not None:
            largest = torch.tensor(entry.input.calibrated, dtype=torch.float32)
            yield f"{module}.input_global_scale", nvfp4_global(largest, entry.input.element).reshape(1)

    def texts(self, policy: Policy, _: Stored) -> Mapping[str, str]:
        """Return config.json with its `quantization_config`."""
        return {
            "config.json": as_text(
                _in_bfloat16(config_of(policy)) | {"quantization_config": quantization_config(policy)}
            )
        }


def _in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that loads in bfloat16: that is what compressed-tensors decodes to, whatever the model's dtype.

    In another one the first matmul of a decoded weight raises.
    """
    changed = {key: _in_bfloat16(value) if isinstance(value, dict) else value for key, value in config.items()}
    named = [key for key in ("dtype", "torch_dtype") if key in config]
    return changed | dict.fromkeys(named, "bfloat16")


def quantization_config(policy: Policy) -> dict[str, Any]:
    """Return what compressed-tensors writes of a policy.

    One scheme is that of every `Linear` but those of `ignore`, by which vLLM finds its fused layers and experts too.
    Several name their layers one by one: vLLM takes a class before the parts of a fused layer. Experts, whose layers
    vLLM asks for under names of its own, stand there as a pattern for each stack.
    """
    schemes = dict[str, tuple[dict[str, Any], list[str]]]()
    for entry in policy.rounded:
        scheme = _scheme(entry)
        schemes.setdefault(repr(scheme), (scheme, []))[1].extend(_targets(entry))
    if len(schemes) == 1:
        _, targets = next(iter(schemes.values()))
        targets[:] = ["Linear", *(name for name in targets if name == policy.head)]  # which is no linear layer to vLLM
    groups = {
        f"group_{number}": {"targets": list(dict.fromkeys(targets)), **scheme}
        for number, (scheme, targets) in enumerate(schemes.values())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(_ignored(policy)),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _scheme(entry: Entry) -> dict[str, Any]:
    assert entry.weight is not None
    inputs = None if entry.input is None else _arguments(entry.input, dynamic=True)
    if inputs is not None and inputs["strategy"] == "tensor_group":
        inputs |= {"dynamic": "local", "observer": "static_minmax"}
    return {
        "format": KINDS[_kind(entry.weight)],
        "input_activations": inputs,
        "output_activations": None,
        "weights": _arguments(entry.weight, dynamic=False),
    }


def _kind(fmt: Format | None) -> str:
    """Return what a format is called here; nothing where no scheme is that."""
    return _NAMES.get(kind_of(fmt), "") if fmt is not None else ""


def _arguments(fmt: Format, *, dynamic: bool) -> dict[str, Any]:
    nested = fmt.scale == "e4m3"
    return {
        "dynamic": dynamic,
        "group_size": fmt.block[1] if fmt.block else None,
        "num_bits": fmt.element.bits,
        "scale_dtype": "torch.float8_e4m3fn" if nested else "torch.uint8",
        "strategy": "tensor_group" if nested else "group",
        "symmetric": True,
        "type": "float",
    }


def _targets(entry: Entry) -> tuple[str, ...]:
    """Return the layer's name in the files, by which vLLM looks, and where transformers has another one that too."""
    if stack := _EXPERT.match(entry.name):
        return (rf"re:.*{re.escape(stack.group(1))}\.\d+\..*",)
    return (entry.module,) if entry.plan is None else (entry.module, entry.plan.name)


def _ignored(policy: Policy) -> Iterator[str]:
    """Yield the modules that are left as they are and might be taken for a linear layer: a tied head among them.

    Where transformers has another name for one than the files, both stand there.
    """
    model = policy.base
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = [entry for entry in policy.entries if len(entry.stored.shape) == 2 and entry.name.endswith(".weight")]
    in_memory = names_in_memory(model, [entry.name for entry in matrices])
    for entry in matrices:
        name = in_memory[entry.name].removesuffix(".weight")
        if entry.weight is None and name not in embeddings:
            yield from dict.fromkeys((entry.module, name))
    if policy.tied and policy.head:
        yield policy.head


def _experts(policy: Policy) -> list[Entry]:
    return [entry for entry in policy.rounded if entry.plan and entry.plan.site.kind == "experts"]


def _lost_in_transformers(policy: Policy) -> Iterator[str]:
    """Yield which packed experts transformers 5, which stacks them while it loads, does not compute with."""
    formats = {_kind(entry.weight) for entry in _experts(policy)}
    if formats == {"nvfp4"}:
        yield "transformers 5 drops the global scales of experts: it loads this, and its answers are wrong"
    elif formats - {"mxfp4"}:
        yield f"transformers 5 cannot load experts in {' and '.join(sorted(formats))}"


def _require_scheme(entry: Entry) -> None:
    """Raise InvalidValueError for a layer that no engine computes as it was trained."""
    weight, given = _kind(entry.weight), entry.input
    assert entry.plan is not None
    if given is None:
        return
    if _kind(given) not in _INPUTS[weight]:
        raise InvalidValueError(
            f"{entry.module}: {weight} weights have no scheme with inputs in {describe(given)}; inputs may be none, "
            f"{', '.join(_INPUTS[weight])}"
        )
    if given.scale == "e4m3" and given.factor != "static":
        raise InvalidValueError(
            f"{entry.module}: NVFP4 inputs have a factor for each {given.factor.removeprefix('per_')} here, and in "
            "compressed-tensors one for all calls (input_global_scale); find it with `fp4rl scan MODEL --calibrate "
            "FILE` and export with +FILE, or take --mode nvfp4_w4a16"
        )


def _words(plan: SitePlan) -> str:
    """Return the formats of a layer in words."""
    words = [str(describe(fmt)) for fmt in (plan.weight, plan.input) if fmt is not None]
    return " with inputs in ".join(words) if plan.weight else "left"
