"""The native backend: C kernels that round and pack the rows of a CPU tensor, on as many threads as torch has."""

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache
from threading import Thread

import torch
from torch import Tensor

from fp4rl.numerics.blocks import columns_of
from fp4rl.numerics.rounding import Seed
from fp4rl.numerics.scales import carry, fp32_scale, nan_where_not_finite, nvfp4_global
from fp4rl.numerics.steps import settled, stepped, table
from fp4rl.spec.formats import E2M1, Format

# The number of each rounding in grid.h, and the fraction above which number 1 rounds up: from one half on, or an ulp
# earlier, above one half, or never.
ROUNDINGS = {
    "nearest_even": (0, 0.0),
    "half_away": (1, 0.5 - 2.0**-25),
    "half_added": (1, 0.5 - 2.0**-24),
    "half_toward_zero": (1, 0.5),
    "toward_zero": (1, 1.0),
    "stochastic": (2, 0.0),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ERRORS = {"exact": 0, "float32": 1, "bfloat16": 2}  # the dtype of four-over-six's errors in grid.h
ELEMENTS_PER_THREAD = 1 << 19  # below this a thread costs more than it saves
WIDEST = 256  # columns of the widest block that pack.c packs


class Rule(ctypes.Structure):
    """A format in the C struct of grid.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("mantissa_bits", "min_exponent", "max_exponent")),
        *((name, ctypes.c_int32) for name in ("rounding", "dtype", "errors")),
        ("seed", ctypes.c_uint32 * 2),
        *((name, ctypes.c_float) for name in ("largest", "threshold")),
        *((name, ctypes.c_void_p) for name in ("up", "up_to_four")),
    )


def supports(x: Tensor, fmt: Format) -> bool:
    """Return whether the kernels know this format: all but those without a scale and the search for the least error."""
    known = fmt.block[0] == 1 if fmt.scale == "e4m3" else fmt.scale != "none"  # type: ignore[index]
    return known and _searches(x, fmt) and x.device.type == "cpu" and x.dtype != torch.float64


def _searches(x: Tensor, fmt: Format) -> bool:
    """Return whether the kernels find the scales: four-over-six is known for rows, in the dtypes of its errors."""
    if fmt.scale_rule != "fouroversix":
        return fmt.scale_rule != "mse"
    return fmt.block is not None and fmt.block[0] == 1 and settled(fmt, x.dtype).scale_math in ERRORS


@lru_cache(maxsize=256)
def _fixed_rule(fmt: Format, dtype: torch.dtype) -> Rule:
    element = fmt.element
    rounding, threshold = ROUNDINGS[fmt.rounding]
    searched = fmt.scale_rule == "fouroversix"
    return Rule(
        *(element.mantissa_bits, element.min_exponent, element.max_exponent),
        *(rounding, DTYPES[dtype], ERRORS.get(fmt.scale_math, 0), (0, 0), element.largest, threshold),
        *(_ups(fmt, dtype).data_ptr(), _ups(fmt, dtype, 4.0).data_ptr() if searched else None),
    )


@cache
def _ups(fmt: Format, dtype: torch.dtype, largest: float | None = None) -> Tensor:
    """Return what to add to the bits of amax in each half binade; kept for good, since rules hold its address."""
    if stepped(fmt):
        return torch.tensor(table(fmt, dtype, torch.float32, largest), dtype=torch.int32)
    return torch.full((512,), carry(fmt.scale_rule, fmt.element, 23) if fmt.scale == "e8m0" else 0, dtype=torch.int32)


def rule_of(fmt: Format, dtype: torch.dtype, seed: Seed | None) -> Rule:
    """Return a format as the kernels' struct, with the `seed` of stochastic rounding."""
    rule = _fixed_rule(settled(fmt, dtype), dtype)
    if seed is not None:
        rule = Rule.from_buffer_copy(rule)
        rule.seed[0], rule.seed[1] = seed[0] & 0xFFFFFFFF, seed[1] & 0xFFFFFFFF
    return rule


def round_native(library: ctypes.CDLL, x: Tensor, fmt: Format, seed: Seed | None, out: Tensor) -> Tensor:
    """Write `reference(x, fmt, seed)` into `out`, which may be x itself; both contiguous, float32 or bfloat16."""
    rule = rule_of(fmt, x.dtype, seed)
    if fmt.block is None:
        return (_round_whole if fmt.factor == "tensor" else _round_scaled)(library, x, rule, fmt, out)
    columns = columns_of(x)
    if fmt.block[0] != 1:
        return _round_tiles(library, x, rule, fmt.block, out)
    width, rows, size = fmt.block[1], x.numel() // columns, x.element_size()
    by_row = fmt.factor == "per_token"
    factor = nvfp4_factor(library, x, rule, fmt) if fmt.scale == "e4m3" and not by_row else 0.0
    source, target = x.data_ptr(), out.data_ptr()

    def part(start: int, count: int) -> None:
        at = start * columns
        where = source + at * size, target + at * size, count, columns, width
        if by_row:
            library.round_tokens(*where, rule, at & 0xFFFFFFFF)
        else:
            library.round_rows(*where, factor, rule, at & 0xFFFFFFFF)

    share(part, rows, x.numel())
    return out


def _round_tiles(library: ctypes.CDLL, x: Tensor, rule: Rule, block: tuple[int, int], out: Tensor) -> Tensor:
    rows, columns = (x.shape[-2] if x.ndim > 1 else 1), columns_of(x)
    height, width = block
    matrices, bands, size = x.numel() // (rows * columns), -(-rows // height), x.element_size()
    source, target = x.data_ptr(), out.data_ptr()

    def part(start: int, count: int) -> None:
        for band in range(start, start + count):
            matrix, row = band // bands, band % bands * height
            at = (matrix * rows + row) * columns
            library.round_tiles(
                *(source + at * size, target + at * size, min(height, rows - row), columns),
                *(height, width, rule, at & 0xFFFFFFFF),
            )

    share(part, matrices * bands, x.numel())
    return out


def _round_whole(library: ctypes.CDLL, x: Tensor, rule: Rule, fmt: Format, out: Tensor) -> Tensor:
    source, target, size = x.data_ptr(), out.data_ptr(), x.element_size()
    bits = _largest_bits(library, x, rule, columns_of(x), finite=False)
    amax = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    scale = nan_where_not_finite(fp32_scale(amax, fmt.element), amax).item()

    def part(start: int, count: int) -> None:
        library.round_run(source + start * size, target + start * size, count, scale, rule, start & 0xFFFFFFFF)

    share(part, x.numel(), x.numel())
    return out


def _round_scaled(library: ctypes.CDLL, x: Tensor, rule: Rule, fmt: Format, out: Tensor) -> Tensor:
    source, target, size, columns = x.data_ptr(), out.data_ptr(), x.element_size(), columns_of(x)
    scale = 0.0 if fmt.calibrated is None else fp32_scale(torch.tensor(fmt.calibrated), fmt.element).item()

    def part(start: int, count: int) -> None:
        at = start * columns
        library.round_scaled(source + at * size, target + at * size, count, columns, scale, rule, at & 0xFFFFFFFF)

    share(part, x.numel() // columns, x.numel())
    return out


def nvfp4_factor(library: ctypes.CDLL, x: Tensor, rule: Rule, fmt: Format) -> float:
    """Return `reference.nvfp4_factor` of the whole tensor."""
    if fmt.calibrated is not None:
        return float(nvfp4_global(torch.tensor(fmt.calibrated), fmt.element))
    assert fmt.block is not None
    return float(library.nvfp4_factor(_largest_bits(library, x, rule, fmt.block[1], finite=True), rule.largest))


def _largest_bits(library: ctypes.CDLL, x: Tensor, rule: Rule, width: int, finite: bool) -> int:
    """Return the bits of the largest magnitude; with `finite` only of blocks without NaN and infinity."""
    columns = columns_of(x)
    source, size, maxima = x.data_ptr(), x.element_size(), [0]

    def part(start: int, count: int) -> None:
        at = source + start * columns * size
        maxima.append(library.largest_of(at, count, columns, width, finite, rule.dtype))

    share(part, x.numel() // columns, x.numel())
    return max(maxima)


def packs(x: Tensor, fmt: Format) -> bool:
    """Return whether the kernels pack x: no rotation or coarse scale, an even width, float32 or bfloat16 on a CPU."""
    if fmt.block is None or fmt.rotation or fmt.coarse or fmt.element != E2M1 or not _searches(x, fmt):
        return False
    height, width = fmt.block
    return height == 1 and width % 2 == 0 and width <= WIDEST and x.device.type == "cpu" and x.dtype in DTYPES


def pack_native(
    library: ctypes.CDLL, x: Tensor, fmt: Format, seed: Seed | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return packed codes, scales and NVFP4's factor of a contiguous tensor; None where a block is not finite."""
    assert fmt.block is not None
    width, columns, rule = fmt.block[1], columns_of(x), rule_of(fmt, x.dtype, seed)
    rows, across, bytes_of_row = x.numel() // columns, -(-columns // width), (columns + 1) // 2
    two_levels = fmt.scale == "e4m3"
    factor = nvfp4_factor(library, x, rule, fmt) if two_levels else 0.0
    data = torch.empty(*x.shape[:-1], bytes_of_row, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], across, dtype=torch.uint8)
    broken = [0]

    def part(start: int, count: int) -> None:
        at = start * columns
        source, target = x.data_ptr() + at * x.element_size(), data.data_ptr() + start * bytes_of_row
        rest = count, columns, width, factor, rule, at & 0xFFFFFFFF
        broken.append(library.pack_rows(source, target, scales.data_ptr() + start * across, *rest))

    share(part, rows, x.numel())
    if sum(broken):
        return None
    if not two_levels:
        return data, scales, None
    return data, scales.view(torch.float8_e4m3fn), torch.tensor(factor, dtype=torch.float32)


def unpack_native(
    library: ctypes.CDLL, data: Tensor, scales: Tensor, factor: Tensor | None, fmt: Format, out: Tensor
) -> Tensor:
    """Write the values of packed codes into `out` [..., columns], contiguous, float32 or bfloat16; returns it."""
    assert fmt.block is not None
    width, columns = fmt.block[1], columns_of(out)
    across, bytes_of_row = -(-columns // width), (columns + 1) // 2
    data, scales = data.contiguous(), scales.contiguous()
    multiplier = 0.0 if factor is None else factor.item()

    def part(start: int, count: int) -> None:
        library.unpack_rows(
            *(data.data_ptr() + start * bytes_of_row, scales.data_ptr() + start * across),
            out.data_ptr() + start * columns * out.element_size(),
            *(count, columns, width, multiplier, DTYPES[out.dtype]),
        )

    share(part, out.numel() // columns, out.numel())
    return out


def share(part: Callable[[int, int], None], units: int, elements: int) -> None:
    """Call `part(start, count)` over all units, in as many threads as pay; the kernels release the GIL.

    The threads are made for each call: after a fork, a pool of threads would be gone.
    """
    threads = min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD, units)
    if threads < 2:
        part(0, units)
        return
    each = -(-units // threads)
    ranges = [(start, min(each, units - start)) for start in range(0, units, each)]
    others = [Thread(target=part, args=r) for r in ranges[1:]]
    for thread in others:
        thread.start()
    part(*ranges[0])
    for thread in others:
        thread.join()


def typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the argument types of its functions declared."""
    pointer, count, rule = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(Rule)
    real, first, flag = ctypes.c_float, ctypes.c_uint32, ctypes.c_int32
    for name, result, *arguments in (
        ("round_rows", None, pointer, pointer, count, count, count, real, rule, first),
        ("round_tokens", None, pointer, pointer, count, count, count, rule, first),
        ("round_tiles", None, pointer, pointer, count, count, count, count, rule, first),
        ("round_scaled", None, pointer, pointer, count, count, real, rule, first),
        ("round_run", None, pointer, pointer, count, real, rule, first),
        ("largest_of", first, pointer, count, count, count, flag, flag),
        ("nvfp4_factor", real, first, real),
        ("pack_rows", count, pointer, pointer, pointer, count, count, count, real, rule, first),
        ("unpack_rows", None, pointer, pointer, pointer, count, count, count, real, flag),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
