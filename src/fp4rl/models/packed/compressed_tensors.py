"""compressed-tensors: `mxfp4-pack-quantized`, `nvfp4-pack-quantized`, `mxfp8-quantized`, and several of them mixed.

A layer P has P.weight_packed (MXFP8: P.weight) and P.weight_scale, of NVFP4 also P.weight_global_scale, by which scales
are divided. What a layer's inputs are rounded to stands in the group of config.json whose `targets` take it.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fp4rl.models.packed.contents import Contents, static_input
from fp4rl.models.packed.weight import CODES, FACTOR, SCALES, StoredWeight, checked, required
from fp4rl.models.shards import StoredTensor
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import FP8, MXFP4, MXFP8, NVFP4, Format
from fp4rl.spec.points import as_served

_FORMATS = {"mxfp4-pack-quantized": MXFP4, "nvfp4-pack-quantized": as_served("weight", NVFP4), "mxfp8-quantized": MXFP8}
_SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
_KEYS = ("num_bits", "type", "strategy", "group_size")
# What `weights` and `input_activations` of a group say of each format.
_ARGUMENTS = {
    MXFP4.name: (4, "float", "group", 32),
    MXFP8.name: (8, "float", "group", 32),
    NVFP4.name: (4, "float", "tensor_group", 16),
}
_UNREAD = ("sparsity_config", "transform_config", "kv_cache_scheme")


def contents(folder: Path, said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Contents:
    """Read what a folder holds; InvalidValueError, in one line, for what is missing, wrong, or not read here."""
    for key in _UNREAD:
        if said.get(key) and (key != "sparsity_config" or said[key].get("format", "dense") != "dense"):
            raise InvalidValueError(f"{folder}: quantization_config has a {key}, which fp4rl does not read")
    groups = [_group(folder, group, said.get("format")) for group in (said.get("config_groups") or {}).values()]
    layers = dict[str, dict[str, StoredTensor]]()
    for name, tensor in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in _SUFFIXES or (last == "weight" and tensor.dtype == torch.float8_e4m3fn):
            layers.setdefault(layer, {})[last] = tensor
    weights = dict[str, StoredWeight]()
    for layer, parts in layers.items():
        group = _of_layer(folder, layer, groups, said.get("ignore") or ())
        weights[f"{layer}.weight"] = checked(folder, _weight(folder, layer, parts, group))
    used = {part.name for parts in layers.values() for part in parts.values()}
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    names = dict.fromkeys(group["format"] for group in groups)
    return Contents(f"compressed-tensors {' and '.join(names)}", weights, plain)


def _group(folder: Path, group: Mapping[str, Any], overall: str | None) -> dict[str, Any]:
    """Return one group with its own format; InvalidValueError for one that is not read here."""
    name, weights = group.get("format") or overall, group.get("weights") or {}
    fmt = _FORMATS.get(str(name))
    if fmt is None:
        raise InvalidValueError(
            f"{folder}: compressed-tensors {name} is not read here; {', '.join(_FORMATS)} and mixtures of them are"
        )
    arguments = tuple(weights.get(key) for key in _KEYS)
    if arguments != _ARGUMENTS[fmt.name] or weights.get("symmetric") is False:
        said = ", ".join(f"{key} {value}" for key, value in zip(_KEYS, arguments, strict=True))
        raise InvalidValueError(f"{folder}: weights of {name} are said to be of {said}, which that format is not")
    return {**group, "format": name, "fmt": fmt}


def _of_layer(folder: Path, layer: str, groups: list[dict[str, Any]], ignore: Any) -> dict[str, Any]:
    """Return the group of a layer: by its name, else by a pattern, else by a class, as compressed-tensors picks it."""
    if any(_matches(layer, target) for target in ignore):
        raise InvalidValueError(f"{folder}: {layer} is packed, but quantization_config lists it under `ignore`")
    for takes in (str.__eq__, _matches, lambda _, target: ":" not in target and "." not in target):
        for group in groups:
            if any(takes(layer, target) for target in group.get("targets") or ()):
                return group
    raise InvalidValueError(f"{folder}: {layer} is packed, but no group of quantization_config takes it")


def _matches(layer: str, target: str) -> bool:
    return layer == target or (target.startswith("re:") and re.match(target[3:], layer) is not None)


def _weight(folder: Path, layer: str, parts: Mapping[str, StoredTensor], group: Mapping[str, Any]) -> StoredWeight:
    fmt, named = group["fmt"], {f"{layer}.{last}": tensor for last, tensor in parts.items()}
    codes = "weight" if group["format"] == "mxfp8-quantized" else "weight_packed"
    wanted = {CODES: codes, SCALES: "weight_scale"} | ({FACTOR: "weight_global_scale"} if fmt.scale == "e4m3" else {})
    own = {part: required(folder, named, f"{layer}.{last}", group["format"]) for part, last in wanted.items()}
    given, unread = _input(folder, layer, named, group.get("input_activations"))
    for last in parts:
        if last not in wanted.values() and not (last == "input_global_scale" and given is not None):
            raise InvalidValueError(
                f"{folder}: {layer}.{last} is not part of {group['format']}, and says another scale"
            )
    return StoredWeight(f"{layer}.weight", fmt, given, own, unread, decoded_in=torch.bfloat16)


def _input(
    folder: Path, layer: str, named: Mapping[str, StoredTensor], arguments: Mapping[str, Any] | None
) -> tuple[Format | None, str | None]:
    """Return the format of a layer's inputs, or what is said of them where no format here is that."""
    if not arguments:
        return None, None
    said = tuple(arguments.get(key) for key in _KEYS)
    dynamic = arguments.get("dynamic")
    for fmt in (MXFP4, MXFP8):
        if said == _ARGUMENTS[fmt.name] and dynamic is True:
            return fmt, None
    if said == _ARGUMENTS[NVFP4.name] and dynamic == "local":
        factor = required(folder, named, f"{layer}.input_global_scale", "a static factor of its inputs")
        return static_input(NVFP4, factor, divides=True), None
    if said[:3] == (8, "float", "token") and dynamic is True:
        return replace(FP8, factor="per_token"), None
    return None, ", ".join(f"{key} {value}" for key, value in zip((*_KEYS, "dynamic"), (*said, dynamic), strict=True))
