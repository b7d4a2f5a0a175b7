"""NVIDIA ModelOpt's NVFP4: `hf_quant_config.json`, or quantization_config of method modelopt.

A layer P has P.weight (uint8 codes), P.weight_scale (E4M3), P.weight_scale_2 (FP32, a multiplier, unlike
compressed-tensors' divisor), and P.input_scale where its inputs are rounded under a static factor.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fp4rl.models.packed.contents import Contents, static_input
from fp4rl.models.packed.weight import CODES, FACTOR, SCALES, StoredWeight, checked, required
from fp4rl.models.shards import StoredTensor
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import NVFP4, Format
from fp4rl.spec.points import as_served

FILE = "hf_quant_config.json"
_MIXED = "MIXED_PRECISION"
_INPUTS = {"NVFP4": True, "W4A16_NVFP4": False}  # whether inputs are rounded
_WEIGHT = as_served("weight", NVFP4)


def contents(folder: Path, said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Contents:
    """Read what a folder holds; InvalidValueError, in one line, for what is missing, wrong, or not read here."""
    said = said.get("quantization") or said
    algorithm = str(said.get("quant_algo"))
    if algorithm not in (*_INPUTS, _MIXED):
        raise InvalidValueError(f"{folder}: modelopt {algorithm} is not read here; {', '.join((*_INPUTS, _MIXED))} are")
    _require_one_statement(folder, said)
    weights, used = dict[str, StoredWeight](), set[str]()
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith(".weight"):
            weight = checked(folder, _weight(folder, name.removesuffix(".weight"), said, tensors))
            weights[name] = weight
            used |= {part.name for part in weight.parts.values()} | {f"{name.removesuffix('weight')}input_scale"}
        elif tensor.dtype == torch.float8_e4m3fn and not name.endswith("_scale"):
            raise InvalidValueError(f"{folder}: {name} is in FP8, which fp4rl does not read from ModelOpt's folders")
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    return Contents(f"modelopt {algorithm}", weights, plain)


def _require_one_statement(folder: Path, said: Mapping[str, Any]) -> None:
    """Raise InvalidValueError where config.json and ModelOpt's own file differ, or groups are not of 16."""
    file = folder / FILE
    own = json.loads(file.read_text(encoding="utf-8")).get("quantization") or {} if file.is_file() else said
    groups = [group.get("weights") or {} for group in (said.get("config_groups") or {}).values()]
    for table in (said, own, *groups):
        if table.get("group_size") not in (None, 16):
            raise InvalidValueError(f"{folder}: modelopt says group_size {table['group_size']}; NVFP4 has groups of 16")
    if own.get("quant_algo") != said.get("quant_algo"):
        raise InvalidValueError(
            f"{folder}: config.json says {said.get('quant_algo')}, and {FILE} {own.get('quant_algo')}; export it anew"
        )


def _weight(folder: Path, layer: str, said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> StoredWeight:
    for pattern in (*(said.get("exclude_modules") or ()), *(said.get("ignore") or ())):
        if fnmatchcase(layer, pattern):
            raise InvalidValueError(f"{folder}: {layer} is packed, but modelopt's configuration excludes it")
    own = (said.get("quantized_layers") or {}).get(layer) or {}
    algorithm = str(own.get("quant_algo") or said.get("quant_algo"))
    if algorithm not in _INPUTS:
        raise InvalidValueError(
            f"{folder}: {layer} is packed as modelopt {algorithm}; {', '.join(_INPUTS)} are read here"
        )
    wanted = {CODES: "weight", SCALES: "weight_scale", FACTOR: "weight_scale_2"}
    parts = {part: required(folder, tensors, f"{layer}.{last}", "NVFP4") for part, last in wanted.items()}
    given: Format | None = None
    if _INPUTS[algorithm]:
        factor = required(folder, tensors, f"{layer}.input_scale", "a static factor of its inputs")
        given = static_input(NVFP4, factor, divides=False)
    return StoredWeight(f"{layer}.weight", _WEIGHT, given, parts, decoded_in=torch.float32, multiplier=True)
