"""What a packed folder holds, whatever its layout, and what several layouts share in reading it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fp4rl.models.packed.weight import StoredWeight
from fp4rl.models.shards import StoredTensor
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format

_NEIGHBOURS = 8  # representable numbers on either side that are tried


@dataclass(frozen=True)
class Contents:
    """`method` in words; packed weights by their name in the unquantized files, and all other tensors."""

    method: str
    weights: Mapping[str, StoredWeight]
    plain: Mapping[str, StoredTensor]


def static_input(fmt: Format, stored: StoredTensor, *, divides: bool) -> Format:
    """Return an input format under the stored static factor; `divides`: 448 * 6 / amax, else its reciprocal.

    `calibrated` is the largest magnitude whose factor is the stored one to the bit, where there is one.
    """
    factor = stored.read().float().reshape(-1)
    if factor.numel() != 1 or not (factor.isfinite().all() and factor.gt(0).all()):
        raise InvalidValueError(f"{stored.file}: {stored.name} is {factor.tolist()}, not one number above 0")
    factor = factor if divides else factor.reciprocal()
    near = factor.reciprocal() * (448.0 * fmt.element.largest)
    bits = near.view(torch.int32) + torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, dtype=torch.int32)
    amax = next((a for a in bits.view(torch.float32) if nvfp4_global(a, fmt.element) == factor), near[0])
    return replace(fmt, factor="static", calibrated=float(amax))
