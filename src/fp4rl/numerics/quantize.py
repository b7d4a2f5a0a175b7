"""Fake quantization: a tensor rounded to the values of a format, in its own dtype."""

from dataclasses import replace

import torch
from torch import Tensor

from fp4rl.numerics.dispatch import round_tensor
from fp4rl.numerics.fallback import rounded_twice
from fp4rl.numerics.levels import inside
from fp4rl.numerics.rounding import Seed, draw_seed, saturated
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    fmt: Format,
    *,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    check_finite: bool = False,
    name: str = "tensor",
) -> Tensor:
    """Round `x` [any shape] to `fmt`; the result has its shape and dtype and is contiguous; no gradient flows.

    A block that holds a NaN or an infinity becomes NaN as a whole. `generator` is needed for stochastic rounding, which
    draws from it once a call. `out` takes the result and may be `x` itself. Raises InvalidValueError, with `name`, for
    integers, a missing generator, an `out` that does not fit, and with `check_finite` for NaN or infinity.
    """
    if x.dtype not in DTYPES:
        raise InvalidValueError(f"{name}: {fmt.name} rounds float32, bfloat16, float16 and float64, not {x.dtype}")
    if check_finite and not bool(torch.isfinite(x).all()):
        raise InvalidValueError(f"{name}: holds NaN or infinity; {fmt.name} would turn whole blocks of it into NaN")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise InvalidValueError(f"{name}: out is {out.dtype} {tuple(out.shape)}, but x is {x.dtype} {tuple(x.shape)}")
    seed = seed_for(fmt, generator, name)
    if not x.numel():
        return x.clone() if out is None else out
    if fmt.fallback is not None:
        once = replace(fmt, fallback=None)
        result = rounded_twice(x, fmt, lambda part: fake_quantize(part, once))
        return result if out is None else out.copy_(result)
    if fmt.coarse is None and fmt.rotation is None:
        return saturated(round_tensor(x, fmt, seed, out), fmt.rounding)
    inner, levels = inside(x, fmt)
    rounded = saturated(round_tensor(inner, fmt, seed), fmt.rounding)
    result = saturated(levels.outside(rounded), fmt.rounding)
    return result if out is None else out.copy_(result)


def seed_for(fmt: Format, generator: torch.Generator | None, name: str = "tensor") -> Seed | None:
    """Return the seed of one stochastic rounding, for which a generator must be given; None for other roundings."""
    if fmt.rounding != "stochastic":
        return None
    if generator is None:
        raise InvalidValueError(f"{name}: {fmt.name} rounds stochastically and needs a torch.Generator")
    return draw_seed(generator)
