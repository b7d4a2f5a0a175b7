"""Packing by the C kernels: values straight to nibbles and scale bytes, and back, for E2M1 in one-row blocks."""

import ctypes

import torch
from torch import Tensor

from fp4rl.numerics.blocks import columns_of
from fp4rl.numerics.native import DTYPES, nvfp4_factor, rule_of, share
from fp4rl.numerics.noise import Seed
from fp4rl.spec.formats import E2M1, Format

WIDEST = 256  # as in pack.c


def supports(x: Tensor, fmt: Format) -> bool:
    """Whether the kernels pack this format: no level around the blocks, an even width, float32 or bfloat16 on a CPU."""
    if fmt.block is None or fmt.rotation or fmt.coarse or fmt.element != E2M1 or fmt.scale_rule == "mse":
        return False
    height, width = fmt.block
    return height == 1 and width % 2 == 0 and width <= WIDEST and x.device.type == "cpu" and x.dtype in DTYPES


def pack_native(
    library: ctypes.CDLL, x: Tensor, fmt: Format, seed: Seed | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Nibbles, scales and NVFP4's factor of a contiguous tensor; None where a block is not finite."""
    assert fmt.block is not None
    width, columns, rule = fmt.block[1], columns_of(x), rule_of(fmt, x.dtype, seed)
    rows, across, bytes_of_row = x.numel() // columns, -(-columns // width), (columns + 1) // 2
    two_levels = fmt.scale == "e4m3"
    factor = nvfp4_factor(library, x, rule, width) if two_levels else 0.0
    data = torch.empty(*x.shape[:-1], bytes_of_row, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], across, dtype=torch.uint8)
    broken = [0]

    def part(start: int, count: int) -> None:
        at = start * columns
        broken.append(
            library.pack_rows(
                x.data_ptr() + at * x.element_size(),
                *(data.data_ptr() + start * bytes_of_row, scales.data_ptr() + start * across),
                *(count, columns, width, factor, rule, at & 0xFFFFFFFF),
            )
        )

    share(part, rows, x.numel())
    if sum(broken):
        return None
    if not two_levels:
        return data, scales, None
    return data, scales.view(torch.float8_e4m3fn), torch.tensor(factor, dtype=torch.float32)


def unpack_native(
    library: ctypes.CDLL, data: Tensor, scales: Tensor, factor: Tensor | None, fmt: Format, out: Tensor
) -> Tensor:
    """The values of packed codes, written into `out` [..., columns], contiguous, float32 or bfloat16."""
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
