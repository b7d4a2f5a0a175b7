"""gpt-oss's own `mxfp4`: experts alone, P_blocks [experts, out, in / 32, 16] and P_scales [experts, out, in / 32].

The unquantized tensor P is [experts, in, out], as transformers has it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4rl.models.packed.contents import Contents
from fp4rl.models.packed.weight import CODES, SCALES, StoredWeight, checked, required
from fp4rl.models.shards import StoredTensor
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4

_BLOCKS, _SCALES = "_blocks", "_scales"


def contents(folder: Path, _said: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Contents:
    """Read what a folder holds; InvalidValueError, in one line, for what is missing or wrong."""
    weights = dict[str, StoredWeight]()
    for name, blocks in tensors.items():
        if not name.endswith(_BLOCKS):
            continue
        if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            raise InvalidValueError(
                f"{folder}: {name} is {list(blocks.shape)}; blocks of 32 are [.., .., .., 16] bytes"
            )
        own = name.removesuffix(_BLOCKS)
        scales = required(folder, tensors, own + _SCALES, name)
        weights[own] = checked(folder, StoredWeight(own, MXFP4, None, {CODES: blocks, SCALES: scales}, transposed=True))
    used = {part.name for weight in weights.values() for part in weight.parts.values()}
    return Contents("mxfp4 (gpt-oss)", weights, {name: tensor for name, tensor in tensors.items() if name not in used})
