"""NVFP4 as NVIDIA ModelOpt 0.47 exports it, for vLLM, SGLang and TensorRT-LLM.

A layer P has P.weight (codes, two a byte), P.weight_scale (E4M3), P.weight_scale_2 (FP32, []) and, where inputs are
rounded, P.input_scale. `hf_quant_config.json` and config.json say the same of them.

ModelOpt decodes code * (scale * weight_scale_2); a run has computed code * (scale / factor), factor 448 * 6 / amax.
Both are rounded in FP32, so that they may differ in its last two bits. weight_scale_2 is the number with which most
values agree: all of them in 199 of 200 layers that were rounded in bfloat16, in one of five in float32.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp4rl.engines.checkpoints.layouts.layout import (
    Layout,
    Named,
    Stored,
    as_text,
    config_of,
    factors_apart,
    require_computed,
    require_formats,
    require_fused,
    require_matrices,
    row_scales,
)
from fp4rl.engines.checkpoints.policy import Entry, Policy
from fp4rl.inject.plan import SitePlan
from fp4rl.models.packed.modelopt import FILE
from fp4rl.models.packed.weight import multiplied
from fp4rl.numerics.packing import Packed, dequantize
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import E2M1, NVFP4

VERSION = "0.47.0"  # of ModelOpt, whose names these are
_LARGEST = 448.0 * E2M1.largest
_SCALES = torch.arange(8, 16) / 8  # every fraction of an E4M3 scale, [8]
_CODES = torch.tensor([1.0, 1.5])  # and of an E2M1 code: all else is powers of two
_STEPS = torch.tensor([0, 1, -1, 2, -2, 3, -3], dtype=torch.int32)  # to neighbours of a float32, the nearest first


class ModelOpt(Layout):
    """NVFP4 weights; inputs unrounded, or in NVFP4 under a static factor."""

    name: ClassVar[str] = "modelopt"
    mode: ClassVar[str] = "nvfp4_w4a16"
    deployment: ClassVar[str] = "modelopt"

    def __init__(self) -> None:
        """Begin to count the values that are decoded to another number than the run computed with."""
        self._values = self._unlike = 0

    def notes(self, _: Policy) -> Iterator[str]:
        """Yield what ModelOpt's order of multiplication changes, once the weights are written."""
        if self._unlike:
            unlike = (
                f"code * (scale * weight_scale_2) gives {self._unlike:,} of {self._values:,} values other last bits"
            )
            yield f"{unlike} than the run computed with; codes and scales are its own"

    def unserved(self, policy: Policy) -> Iterator[str]:
        """Yield also which NVFP4 weights have factors of their own in a matrix that vLLM fuses."""
        yield from super().unserved(policy)
        yield from factors_apart(policy)

    def require(self, policy: Policy) -> None:
        """Raise InvalidValueError, with the cure, for anything but NVFP4 whose inputs are unrounded or static."""
        for entry in policy.rounded:
            if entry.weight is not None and entry.weight.element == E2M1 and entry.weight.scale == "e8m0":
                raise InvalidValueError(
                    f"{entry.name} is rounded to MXFP4, which no engine loads from ModelOpt's layout; take "
                    "--to compressed_tensors or --to ascend_v1, or --mode nvfp4_w4a16"
                )
        require_matrices(policy, self.name)
        require_formats(policy, (NVFP4,), self.name)
        require_computed(policy)
        require_fused(policy, _algorithm, "none")

    def tensors(self, policy: Policy, entry: Entry) -> Iterator[Named]:
        """Yield codes, scales and multipliers of a rounded weight; any other tensor as it is."""
        if entry.weight is None:
            yield entry.name, policy.value(entry)
            return
        made = policy.packed(entry)
        assert isinstance(made, Packed)
        assert made.factor is not None
        scale = multiplier(made.factor, made.levels.dtype)
        self._count(made, scale)
        yield entry.name, made.data
        yield f"{entry.name}_scale", row_scales(made)
        yield f"{entry.name}_scale_2", scale
        if entry.input is not None and entry.input.calibrated is not None:
            yield f"{entry.module}.input_scale", input_scale(entry.input.calibrated)

    def texts(self, policy: Policy, _: Stored) -> Mapping[str, str]:
        """Return config.json with its `quantization_config`, and ModelOpt's own file."""
        said, own = _quantization(policy), config_of(policy)
        producer = {"name": "modelopt", "version": VERSION}  # loaders look for the name; the card says who wrote it
        own["quantization_config"] = _in_config(said) | {"producer": producer, "quant_method": "modelopt"}
        return {
            "config.json": as_text(own),
            FILE: json.dumps({"producer": producer, "quantization": said}, indent=4),
        }

    def _count(self, made: Packed, scale: Tensor) -> None:
        self._values += 2 * made.data.numel()
        assert made.factor is not None
        if _agreeing(scale, made.factor, made.levels.dtype) < len(_SCALES) * len(_CODES):
            rounded = multiplied(made, scale).to(made.levels.dtype)
            self._unlike += int((rounded != dequantize(made)).sum())


def multiplier(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weight_scale_2, [] float32, for a factor that block scales were multiplied by.

    ModelOpt's own, amax / (448 * 6), or a neighbour of the reciprocal where that makes more values those of `dtype`.
    """
    largest = (_LARGEST / factor).to(dtype).float()
    near = (factor.reciprocal().view(torch.int32) + _STEPS).view(torch.float32)
    candidates: tuple[Tensor, ...] = (largest / _LARGEST, *near)
    return max(candidates, key=lambda scale: _agreeing(scale, factor, dtype))


def input_scale(calibrated: float) -> Tensor:
    """Return the static scale of inputs up to a magnitude, [] float32: ModelOpt's own, calibrated / (448 * 6), or a
    neighbour whose reciprocal, which kernels multiply by, is the factor of the run."""
    largest = torch.tensor(calibrated, dtype=torch.float32)
    factor = nvfp4_global(largest, E2M1)
    near = (factor.reciprocal().view(torch.int32) + _STEPS).view(torch.float32)
    candidates: tuple[Tensor, ...] = (largest / _LARGEST, *near)
    return max(candidates, key=lambda scale: bool(scale.reciprocal() == factor))


def _agreeing(scale: Tensor, factor: Tensor, dtype: torch.dtype) -> int:
    """Return how many of the products of a code and a block scale are the same multiplied as they are divided."""
    divided = (_SCALES / factor).unsqueeze(-1) * _CODES
    times = (_SCALES * scale).unsqueeze(-1) * _CODES
    return int((divided.to(dtype) == times.to(dtype)).sum())


def _algorithm(plan: SitePlan) -> str:
    """Return ModelOpt's word for the formats of a layer; raises InvalidValueError where it has none."""
    if plan.weight is None:
        return "none"
    if plan.input is None:
        return "W4A16_NVFP4"
    if (plan.input.element, plan.input.scale, plan.input.factor) == (E2M1, "e4m3", "static"):
        return "NVFP4"
    factor = f", a factor for each {plan.input.factor.removeprefix('per_')}" if plan.input.scale == "e4m3" else ""
    raise InvalidValueError(
        f"{plan.name}: inputs are rounded to {plan.input.name}{factor}; ModelOpt has NVFP4 inputs with one factor for "
        "all calls (input_scale): find it with `fp4rl scan MODEL --calibrate FILE` and export with +FILE, or "
        "take --mode nvfp4_w4a16"
    )


def _quantization(policy: Policy) -> dict[str, Any]:
    """Return what hf_quant_config.json says: one algorithm and who is left out, or the algorithm of each layer."""
    layers = {entry.module: _algorithm(entry.plan) for entry in policy.rounded if entry.plan}
    if len(set(layers.values())) > 1:
        own = {module: {"quant_algo": algorithm, "group_size": 16} for module, algorithm in layers.items()}
        return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": own}
    left = {entry.module for entry in policy.entries if entry.weight is None and len(entry.stored.shape) > 1}
    left |= {policy.head} if policy.tied else set()
    algorithm = next(iter(layers.values()))
    return {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": sorted(left),
    }


def _in_config(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same for config.json, in groups of layers."""
    layers = said.get("quantized_layers", {})
    names = [each["quant_algo"] for each in layers.values()] or [said["quant_algo"]]
    groups = [_group(name) for name in dict.fromkeys(names)]
    for name, group in zip(dict.fromkeys(names), groups, strict=True):
        group["targets"] = sorted(m for m, each in layers.items() if each["quant_algo"] == name) or ["Linear"]
    config = {"config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}
    config |= {"quantized_layers": layers} if layers else {}
    return config | {"ignore": said.get("exclude_modules", []), "quant_algo": said["quant_algo"]}


def _group(algorithm: str) -> dict[str, Any]:
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {"input_activations": arguments, "weights": arguments} if algorithm == "NVFP4" else {"weights": arguments}
