"""AscendV1, as msModelSlim writes it: `quant_model_description.json` names the type of every tensor.

A layer P of an MX type has P.weight (codes), P.weight_scale (exponent + 127), a dual scale P.weight_dual_scale above
them, and perhaps P.bias. The description says what inputs are rounded to by the type alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp4rl.models.packed.contents import Contents
from fp4rl.models.packed.weight import COARSE, CODES, SCALES, StoredWeight, checked, required
from fp4rl.models.shards import StoredTensor
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, MXFP4_DUAL, MXFP8, Coarse, Format

DESCRIPTION = "quant_model_description.json"
PLAIN = "FLOAT"
# The type of a layer -> formats of its weight and of its inputs.
TYPES: Mapping[str, tuple[Format, Format | None]] = {
    "W4A4_MXFP4": (MXFP4, MXFP4),
    "W4A16_MXFP4": (MXFP4, None),  # of routed experts; vLLM-Ascend has it, msModelSlim writes none
    "W4A8_MXFP": (MXFP4, MXFP8),
    "W8A8_MXFP8": (MXFP8, MXFP8),
    "W4A4_MXFP4_DUALSCALE": (MXFP4_DUAL, MXFP4_DUAL),
}
_ABOUT = ("version", "model_quant_type", "metadata", "group_size", "optional")  # all other keys are tensors
_USUAL_COLUMNS = 512  # of a dual scale, in msModelSlim's recipes


def contents(folder: Path, said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Contents:
    """Read what a folder holds; InvalidValueError, in one line, for what is missing, wrong, or not read here."""
    if said.get("optional") or (said.get("metadata") or {}).get("quarot"):
        raise InvalidValueError(f"{folder}: {DESCRIPTION} names rotations or options, which fp4rl does not read")
    types = {name: kind for name, kind in said.items() if name not in _ABOUT}
    _require_listed(folder, types, tensors)
    layers = {
        name.removesuffix(".weight"): kind for name, kind in types.items() if kind != PLAIN and name.endswith(".weight")
    }
    if layers and (size := said.get("group_size")) != 32:
        raise InvalidValueError(f"{folder}: {DESCRIPTION} says group_size {size}; MX formats have groups of 32")
    columns = _columns_of_dual_scales(folder, layers, tensors)
    weights, used = dict[str, StoredWeight](), set[str]()
    for layer, kind in layers.items():
        weight = checked(folder, _weight(folder, layer, kind, tensors, columns))
        weights[weight.name] = weight
        used |= {part.name for part in weight.parts.values()}
    for name, kind in types.items():
        if kind != PLAIN and name not in used and not name.endswith(".bias"):
            raise InvalidValueError(f"{folder}: {name} is of type {kind}, which has no such tensor")
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    return Contents(f"AscendV1 {said.get('model_quant_type', '')}".strip(), weights, plain)


def _require_listed(folder: Path, types: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for names, others, what in (
        (tensors, types, f"is in the files, but {DESCRIPTION} does not list it"),
        (types, tensors, f"is listed in {DESCRIPTION}, but no file holds it"),
    ):
        if missing := next((name for name in names if name not in others), None):
            raise InvalidValueError(f"{folder}: {missing} {what}; copy the checkpoint anew")
    for name, kind in types.items():
        if kind != PLAIN and kind not in TYPES:
            raise InvalidValueError(
                f"{folder}: {name} is of type {kind}, which is not read here; {', '.join(TYPES)} and {PLAIN} are"
            )


def _weight(folder: Path, layer: str, kind: str, tensors: Mapping[str, StoredTensor], columns: int) -> StoredWeight:
    fmt, given = TYPES[kind]
    wanted = {CODES: "weight", SCALES: "weight_scale"} | ({COARSE: "weight_dual_scale"} if fmt.coarse else {})
    parts = {part: required(folder, tensors, f"{layer}.{last}", kind) for part, last in wanted.items()}
    if fmt.coarse:
        fmt = given = replace(fmt, coarse=Coarse(columns))
    return StoredWeight(f"{layer}.weight", fmt, given, parts)


def _columns_of_dual_scales(folder: Path, layers: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> int:
    """Return how many columns share a dual scale, which is written nowhere: the number that fits every layer."""
    runs = list[tuple[int, int]]()
    for layer, kind in layers.items():
        dual = tensors.get(f"{layer}.weight_dual_scale")
        if TYPES[kind][0].coarse and dual is not None and len(dual.shape) == 3:
            runs.append((2 * tensors[f"{layer}.weight"].shape[-1], dual.shape[1]))
    widest = max((width for width, _ in runs), default=0)
    powers: list[int] = [1 << power for power in range(5, widest.bit_length() + 1)]
    for columns in (_USUAL_COLUMNS, *powers, *range(32, widest + 1, 32)):
        if all(-(-width // columns) == count for width, count in runs):
            return int(columns)
    raise InvalidValueError(f"{folder}: no one number of columns fits the shapes of all its dual scales")
