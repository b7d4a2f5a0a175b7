"""What may have made a tensor differ: patterns that ordinary faults of packing and loading leave in the values."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fp4rl.spec.formats import Format

_NEAR = 1.01  # a ratio of values that were rounded once more


def cause(
    name: str,
    here: Tensor,
    fmt: Format | None,
    values: Mapping[str, Tensor],
    masters: Callable[[], Mapping[str, Tensor]],
) -> str:
    """Return what explains all that differs in `here`, in words; nothing where no pattern does."""
    expected = values[name]
    if fmt is not None and (master := masters().get(name)) is not None and _same(here, master):
        return "it is not rounded"
    if (other := next(_like(name, here, values), None)) is not None:
        return f"it holds the values of {other}"
    if here.ndim < 2 or here.shape[-1] % 2:
        return ""
    if _same(torch.unflatten(here, -1, (-1, 2)).flip(-1).flatten(-2), expected):
        return "neighbouring columns are exchanged, as by the order of nibbles"
    return "" if fmt is None else _scaled(here, expected, fmt)


def _like(name: str, here: Tensor, values: Mapping[str, Tensor]) -> Iterator[str]:
    return (other for other, value in values.items() if other != name and _same(here, value))


def _same(first: Tensor, other: Tensor) -> bool:
    if first.shape != other.shape or not torch.equal(first[:1].float(), other[:1].float()):  # most differ there
        return False
    return torch.equal(first.float(), other.float())


def _scaled(here: Tensor, expected: Tensor, fmt: Format) -> str:
    """Return a factor that all values, or those of whole blocks, are wrong by: codes are right and scales wrong."""
    a, b = here.float(), expected.float()
    if not torch.equal(a == 0, b == 0):
        return ""
    ratio = torch.where(b == 0, torch.nan, a / b)
    known = ratio[~ratio.isnan()]
    if known.numel() and known.min() > 0 and known.max() < known.min() * _NEAR:
        return f"all values are {float(known.median()):.4g} times the policy's: a scale of the whole tensor"
    width = fmt.block[1] if fmt.block else here.shape[-1]
    if here.shape[-1] % width:
        return ""
    blocks = torch.unflatten(ratio, -1, (-1, width))
    low, high = blocks.nan_to_num(nan=torch.inf).amin(-1), blocks.nan_to_num(nan=-torch.inf).amax(-1)
    even = (low > 0) & (high <= low * _NEAR) | low.isinf()
    if not bool(even.all()):
        return ""
    other = ((low - 1).abs() > _NEAR - 1) & ~low.isinf()
    return f"codes are right, the scales of {int(other.sum()):,} of {other.numel():,} blocks are others"
