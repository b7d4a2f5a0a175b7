"""A quick test of a quantizer: known vectors, ties, scale invariance, idempotence, unbiased noise, true tiles.

Each check catches a fault that was made in practice: NVFP4 without its FP32 scale, FP8 without any scale, stochastic
rounding that returned half the value, "2-D" blocks of 1,024 consecutive elements, ties to the wrong neighbour.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf, log10

import torch
from torch import Tensor

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import BF16, FORMATS, FP8, MXFP4, MXFP4_2D, MXFP4_SR, MXFP8, NVFP4, Format

Quantizer = Callable[[Tensor, Format, torch.Generator], Tensor]

# Every grid value of E2M1 and every tie between two, in a block whose scale is one: OCP MX v1.0, ties to the even code.
E2M1_IN = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0)
E2M1_OUT = (0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 6.0, 6.0)
# E4M3 at scale one: its ends, a subnormal tie, and ties around 16 where the spacing is 2.
E4M3_IN = (448.0, 17.0, 19.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 0.0, 20.0)
E4M3_OUT = (448.0, 16.0, 20.0, 2.0**-9, 0.0, 2.0**-8, 0.0, 20.0)
SIZES = (1.0, 0.02, 0.005)  # standard deviations, down to that of real weights
SAME_DB = 0.15
DRAWS = 4096


@dataclass(frozen=True)
class Check:
    """The result of one check: its name, whether it passed, and what was seen."""

    name: str
    passed: bool
    seen: str


def self_test(quantizer: Quantizer | None = None) -> tuple[Check, ...]:
    """Run every check on `quantizer(x, fmt, generator)`, by default fake quantization itself; takes under a second."""
    chosen = quantizer or (lambda x, fmt, generator: fake_quantize(x, fmt, generator=generator))
    checks = (_known_vectors, _scale_invariance, _powers_of_two, _idempotence, _unbiased_noise, _true_tiles)
    return tuple(result for check in checks for result in check(chosen))


def require_sound(quantizer: Quantizer | None = None) -> None:
    """Raise CheckFailed naming every check that did not pass."""
    broken = [check for check in self_test(quantizer) if not check.passed]
    if broken:
        raise CheckFailed("the quantizer is broken: " + "; ".join(f"{check.name}: {check.seen}" for check in broken))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _known_vectors(quantizer: Quantizer) -> Iterator[Check]:
    """Check known vectors; the tensors for NVFP4 and FP8 hold a value that makes their FP32 scale one."""
    e2m1, e4m3 = torch.tensor(E2M1_IN), torch.tensor(E4M3_IN)
    nvfp4_wanted = torch.cat((torch.tensor(E2M1_OUT[:-1]), torch.tensor([6.0]), torch.full((16,), 2688.0)))
    for fmt, given, wanted in (
        (MXFP4, e2m1.repeat(2), torch.tensor(E2M1_OUT).repeat(2)),
        (NVFP4, torch.cat((e2m1[:-1], e2m1[-2:-1], torch.full((16,), 2688.0))), nvfp4_wanted),
        (MXFP8, e4m3.repeat(4), torch.tensor(E4M3_OUT).repeat(4)),
        (FP8, e4m3, torch.tensor(E4M3_OUT)),
    ):
        for sign in (1.0, -1.0):
            made = quantizer(given * sign, fmt, _generator())
            wrong = (made != wanted * sign).nonzero().flatten().tolist()
            changes = [f"{given[at] * sign:g} became {made[at]:g}, not {wanted[at] * sign:g}" for at in wrong[:1]]
            yield Check(f"known vectors, {fmt.name}", not wrong, "".join(changes) or "all")


def _sqnr_db(x: Tensor, made: Tensor) -> float:
    error = (made - x).double().square().sum().item()
    return 10 * log10(x.double().square().sum().item() / error) if error else inf


def _scale_invariance(quantizer: Quantizer) -> Iterator[Check]:
    x = torch.randn(128, 512, generator=_generator())
    for fmt in (MXFP4, MXFP8, NVFP4, FP8):
        decibels = [_sqnr_db(x * size, quantizer(x * size, fmt, _generator())) for size in SIZES]
        spread = max(decibels) - min(decibels)
        seen = ", ".join(f"{db:.2f} dB at {size:g}" for db, size in zip(decibels, SIZES, strict=True))
        yield Check(f"same error at every size, {fmt.name}", spread <= SAME_DB, seen)


def _powers_of_two(quantizer: Quantizer) -> Iterator[Check]:
    x = torch.randn(64, 96, generator=_generator())
    for fmt in FORMATS.values():
        times = quantizer(x * 2.0**-9, fmt, _generator())
        same = torch.equal(times, quantizer(x, fmt, _generator()) * 2.0**-9)
        seen = "yes" if same else "scaling by 2^-9 changed the rounding"
        yield Check(f"follows powers of two, {fmt.name}", same, seen)


def _idempotence(quantizer: Quantizer) -> Iterator[Check]:
    x = torch.randn(64, 96, generator=_generator())
    for fmt in (MXFP4, MXFP4_2D, MXFP8, NVFP4, FP8, BF16):
        once = quantizer(x, fmt, _generator())
        shifted = (quantizer(once, fmt, _generator()) - once).abs().max().item()
        # NVFP4's FP32 factor is made anew from the rounded maximum and may differ in its last bit.
        passed = shifted <= (1e-6 if fmt == NVFP4 else 0.0)
        yield Check(f"rounding twice is rounding once, {fmt.name}", passed, f"shifted by {shifted:g}")


def _unbiased_noise(quantizer: Quantizer) -> Iterator[Check]:
    """Check that the mean over many draws is within four standard errors of every value, and of their sum."""
    x = torch.linspace(0.05, 7.9, 32)  # 7.9 does not fit under the floor scale, which would clip it to 6
    for fmt in (MXFP4_SR, replace(NVFP4, rounding="stochastic")):
        made = quantizer(x.repeat(DRAWS, 1), fmt, _generator()).double()
        total = made.sum(-1)
        error = (total.mean() - x.double().sum()).abs().item()
        allowed = 4 * (total.std() / DRAWS**0.5).item() + 1e-6 * x.sum().item()
        unbiased = error <= allowed and bool((made.std(0) > 0).any())
        seen = f"mean off by {error:.3g}, four standard errors are {allowed:.3g}"
        yield Check(f"stochastic rounding is unbiased, {fmt.name}", unbiased, seen)


def _true_tiles(quantizer: Quantizer) -> Iterator[Check]:
    """Check that an outlier coarsens its own block alone: 32 x 32 for a tile, 32 along the last axis for a row."""
    for fmt in (MXFP4, MXFP4_2D):
        assert fmt.block is not None
        x = 1 + 0.3 * torch.rand(96, 96, generator=_generator())
        spoilt = x.clone()
        spoilt[40, 40] = 1e4
        changed = (quantizer(spoilt, fmt, _generator()) != quantizer(x, fmt, _generator())).nonzero()
        low, high = changed.min(0).values.tolist(), changed.max(0).values.tolist()
        wanted = ([32, 32], [63, 63]) if fmt.block[0] > 1 else ([40, 32], [40, 63])
        seen = f"an outlier at 40, 40 changed rows {low[0]}..{high[0]}, columns {low[1]}..{high[1]}"
        yield Check(f"blocks lie where they should, {fmt.name}", (low, high) == wanted, seen)
