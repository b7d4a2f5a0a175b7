"""What rounding costs, against a plain copy of the same bytes into a buffer that is there, and against the peers.

    python benchmarks/numerics.py [--rounds 15] [--dry]     writes benchmarks/results/cpu.md
    python benchmarks/numerics.py --gpu [--dry]             writes benchmarks/results/<gpu>.md; skipped without CUDA

Every measurement takes turns with a copy: a figure is the median over the rounds of one's time over the other's, so
that a busy machine says the same. One thread is counted in CPU seconds, two in seconds on the wall.
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4rl.numerics import native_build
from fp4rl.numerics.dispatch import use
from fp4rl.numerics.packing import dequantize, pack_tensor
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference, round_chunked
from fp4rl.spec.formats import FORMATS, MXFP4, MXFP4_2D, MXFP4_SR, NVFP4, Format

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (1536, 8960))
DTYPES = (torch.float32, torch.bfloat16)
# Label -> (at most times a copy in float32, in bfloat16), one thread.
AIMS = {
    "mxfp4": (2.0, 4.0),
    "nvfp4": (3.0, 6.0),
    "mxfp4_2d": (3.0, 5.0),
    "mxfp4 pack": (5.0, 5.0),
    "mxfp4 unpack": (5.0, 5.0),
    "nvfp4 pack": (5.0, 5.0),
    "nvfp4 unpack": (5.0, 5.0),
    "msModelSlim minmax": (2.0, 4.0),
    "msModelSlim ceil_x": (2.0, 4.0),
    "msModelSlim fouroversix": (3.0, 6.0),
    "AMCT round": (2.0, 4.0),
    "modelopt rceil": (2.0, 4.0),
    "msModelSlim minmax pack": (5.0, 5.0),
    "msModelSlim fouroversix pack": (5.0, 5.0),
}
MINMAX = replace(MXFP4, scale_rule="even", scale_epsilon=9.6e-7, scale_math="tensor", rounding="half_added")
# The rules of packers, as `tests/numerics` holds them against the packages.
RULES = {
    "msModelSlim minmax": MINMAX,
    "msModelSlim ceil_x": replace(MINMAX, scale_rule="uos"),
    "msModelSlim fouroversix": replace(MINMAX, scale_rule="fouroversix", scale_epsilon=0.0),
    "AMCT round": replace(MXFP4, scale_rule="round", scale_math="float32", rounding="half_away"),
    "modelopt rceil": replace(MXFP4, scale_rule="rceil", scale_math="float32", rounding="half_toward_zero"),
}
PEER_TIMES = 30.0  # every peer at least so many times slower than this project's kernels

Deed = Callable[[], object]


def in_turn(deed: Deed, copy: Deed, rounds: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(median of deed's time over copy's, median seconds of the copy), both warm and taking turns."""
    deed(), copy()
    ratios, copies = [], []
    for _ in range(rounds):
        start = clock()
        copy()
        between = clock()
        deed()
        copies.append(max(between - start, 1e-9))
        ratios.append((clock() - between) / copies[-1])
    return statistics.median(ratios), statistics.median(copies)


def data(shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)


def ours(x: Tensor) -> Iterator[tuple[str, Deed]]:
    """This project's deeds on x, into buffers that are there unless the label says otherwise."""
    out, generator = torch.empty_like(x), torch.Generator().manual_seed(0)
    for name in ("mxfp4", "nvfp4", "mxfp4_2d", "mxfp4_sr", "mxfp8", "fp8"):
        yield name, lambda name=name: fake_quantize(x, FORMATS[name], generator=generator, out=out)
    yield "fp8, per token", lambda: fake_quantize(x, replace(FORMATS["fp8"], factor="per_token"), out=out)
    for label, fmt in RULES.items():
        yield label, lambda fmt=fmt: fake_quantize(x, fmt, out=out)
    yield "msModelSlim minmax pack", lambda: pack_tensor(x, MINMAX)
    yield "msModelSlim fouroversix pack", lambda: pack_tensor(x, RULES["msModelSlim fouroversix"])
    yield "mxfp4, fresh output", lambda: fake_quantize(x, MXFP4)
    for fmt in (MXFP4, NVFP4):
        packed = pack_tensor(x, fmt)
        yield f"{fmt.name} pack", lambda fmt=fmt: pack_tensor(x, fmt)
        yield f"{fmt.name} unpack", lambda packed=packed: dequantize(packed, out=out)


def other_backends(x: Tensor) -> Iterator[tuple[str, Deed]]:
    """MXFP4 without the C kernels."""
    out = torch.empty_like(x)
    yield "chunked (no compiler)", lambda: round_chunked(x, MXFP4, None, out)
    yield "reference (plain PyTorch)", lambda: reference(x, MXFP4)


def peers(x: Tensor) -> Iterator[tuple[str, Deed]]:
    """Quantize and dequantize by other libraries, on their eager paths, with the rule that each is known for."""
    if find_spec("torchao"):
        module = import_module("torchao.prototype.mx_formats.mx_tensor")
        mx, rule = module.MXTensor, module.ScaleCalculationMode.FLOOR
        yield "torchao mxfp4", lambda: mx.to_mx(x, torch.float4_e2m1fn_x2, 32, rule).dequantize(x.dtype)
        two = import_module("torchao.prototype.mx_formats.nvfp4_tensor")
        scale = two.per_tensor_amax_to_scale(x.abs().amax())
        yield "torchao nvfp4", lambda: two.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)
    if find_spec("compressed_tensors"):
        schemes = import_module("compressed_tensors.quantization.quant_scheme")
        helpers = import_module("compressed_tensors.quantization.utils.helpers")
        rounded = import_module("compressed_tensors.quantization.lifecycle.forward").fake_quantize
        options = schemes.MXFP4A16["weights"]

        def as_weight() -> Tensor:
            scales, zeros = helpers.compute_dynamic_scales_and_zp(x, options, None)
            return rounded(x, scales, zeros, options)  # type: ignore[no-any-return]

        yield "compressed-tensors mxfp4", as_weight
    if find_spec("modelopt"):
        tensor = import_module("modelopt.torch.quantization.qtensor").MXFP4QTensor

        def there_and_back() -> Tensor:
            stored, scales = tensor.quantize(x, 32)
            return stored.dequantize(dtype=x.dtype, scale=scales, block_sizes={-1: 32})  # type: ignore[no-any-return]

        yield "modelopt mxfp4", there_and_back


def cpu(rounds: int) -> Iterator[str]:
    """The lines of cpu.md."""
    use("native")
    yield "# Rounding on a CPU, against a copy"
    yield ""
    yield (
        "`python benchmarks/numerics.py` makes these tables. Figures are times of a plain copy of the same bytes into "
        f"a buffer that is there: medians of {rounds} rounds in which the copy and the deed take turns (other backends "
        "and peers: fewer), values of size 0.02. One thread in CPU seconds, two in seconds on the wall. `out=` is "
        "given unless a row says otherwise; in bold what misses its aim."
    )
    yield ""
    yield f"{processor()}, {torch.get_num_threads()} cores; torch {torch.__version__}, {compiler()}."
    for threads in (1, 2):
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        yield from ("", f"**{'One thread' if threads == 1 else 'Two threads'}**", "", *heading(threads == 1))
        yield from table(ours, rounds, clock, AIMS if threads == 1 else {})
    torch.set_num_threads(1)
    yield from ("", "**MXFP4 by the other backends, one thread**", "", *heading(False))
    yield from table(other_backends, max(3, rounds // 3), time.process_time, {})
    yield from ("", f"**Peers, one thread** (aim: each at least {PEER_TIMES:g} times this project's time)", "")
    yield from against_peers()


def heading(aimed: bool) -> list[str]:
    columns = [f"{rows} x {cols}, {said(dtype)}" for dtype in DTYPES for rows, cols in SHAPES]
    columns += ["aim fp32 / bf16"] * aimed
    return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]


def table(
    deeds: Callable[[Tensor], Iterator[tuple[str, Deed]]],
    rounds: int,
    clock: Callable[[], float],
    aims: dict[str, tuple[float, float]],
) -> Iterator[str]:
    """One row a deed, one column a dtype and shape; a figure beyond its aim stands in bold."""
    rows: dict[str, list[str]] = {"a copy, ms": []}
    for place, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            x = data(shape, dtype)
            target, copies = torch.empty_like(x), []
            for label, deed in deeds(x):
                found, copied = in_turn(deed, lambda t=target, x=x: t.copy_(x), rounds, clock)
                late = label in aims and found > aims[label][place]
                rows.setdefault(label, []).append(f"**{found:.2f}**" if late else f"{found:.2f}")
                copies.append(copied)
            rows["a copy, ms"].append(f"{1000 * statistics.median(copies):.2f}")
    for label, cells in rows.items():
        if aims:
            cells.append(" / ".join(f"{aim:g}" for aim in aims[label]) if label in aims else "")
        yield f"| {label} | " + " | ".join(cells) + " |"


def against_peers() -> Iterator[str]:
    """Times a copy, and times this project's own kernel for the same format, on one shape."""
    yield "| 1536 x 8960 | float32: copies | times ours | bfloat16: copies | times ours |"
    yield "|---|---|---|---|---|"
    rows: dict[str, list[str]] = {}
    for dtype in DTYPES:
        x = data(SHAPES[1], dtype)
        target, out = torch.empty_like(x), torch.empty_like(x)
        for label, deed in peers(x):
            fmt = NVFP4 if label.endswith("nvfp4") else MXFP4
            copies, _ = in_turn(deed, lambda t=target, x=x: t.copy_(x), 3, time.process_time)
            own: Deed = lambda x=x, f=fmt, o=out: fake_quantize(x, f, out=o)  # noqa: E731
            times, _ = in_turn(deed, own, 3, time.process_time)
            package = label.split()[0].replace("modelopt", "nvidia-modelopt")
            few = f"**{times:.0f}**" if times < PEER_TIMES else f"{times:.0f}"
            rows.setdefault(f"{label} ({version(package)})", []).extend((f"{copies:.0f}", few))
    for label, cells in rows.items():
        yield f"| {label} | " + " | ".join(cells) + " |"


def said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def compiler() -> str:
    found = native_build.compiler()
    return f"kernels built by {Path(found).name}" if found else "no C compiler"


# ------------------------------------------------------------------------------------------------------ GPU


GPU_FORMATS: tuple[tuple[Format, float], ...] = ((MXFP4, 0.85), (NVFP4, 0.0), (MXFP4_2D, 0.0), (MXFP4_SR, 0.0))
GPU_SHAPE = (8192, 16384)


def gpu(rounds: int) -> Iterator[str]:
    """Bandwidth of the Triton kernels as a share of a device copy's; equality with the reference is checked first."""
    from fp4rl.numerics import triton_kernels

    use("triton")
    name = torch.cuda.get_device_name()
    yield f"# Rounding on one {name}, against a device copy"
    yield ""
    yield (
        f"`python benchmarks/numerics.py --gpu` makes this table: torch {torch.__version__}, triton "
        f"{version('triton')}. {GPU_SHAPE[0]} x {GPU_SHAPE[1]} values, medians of {rounds} rounds of 20 calls, a copy "
        "and the kernel in turn. The bandwidth counts one read and one write of every value; NVFP4 reads twice. Every "
        "kernel's result is the reference's bit for bit, on this device and on the CPU, before it is timed."
    )
    yield ""
    yield "| | " + " | ".join(f"{said(d)}: share of a copy | TB/s" for d in DTYPES) + " | aim |"
    yield "|---|---|---|---|---|---|"
    for fmt, aim in GPU_FORMATS:
        cells = []
        for dtype in DTYPES:
            seed = (123, -456) if fmt.rounding == "stochastic" else None
            check_equal(fmt, dtype, seed)
            x = data(GPU_SHAPE, dtype, "cuda")
            out, target = torch.empty_like(x), torch.empty_like(x)
            deed = lambda f=fmt, s=seed, x=x, o=out: triton_kernels.round_triton(x, f, s, o)  # noqa: E731
            copy, took = on_device(deed, lambda x=x, t=target: t.copy_(x), rounds)
            share = copy / took
            moved = 2 * x.numel() * x.element_size() / took / 1e12
            cells += [f"**{share:.2f}**" if share < aim else f"{share:.2f}", f"{moved:.2f}"]
        yield f"| {fmt.name} | " + " | ".join(cells) + f" | {aim or ''} |"


def check_equal(fmt: Format, dtype: torch.dtype, seed: Any) -> None:
    """Raises SystemExit where the kernel's bits are not the reference's."""
    from fp4rl.numerics import triton_kernels

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2048, 4100, generator=generator)  # ragged
    x *= torch.exp2(torch.randint(-100, 100, (2048, 1), generator=generator).float())
    x[5, 7], x[9] = torch.nan, 0.0
    x = x.to(dtype)
    made = triton_kernels.round_triton(x.cuda(), fmt, seed, torch.empty_like(x, device="cuda")).cpu()
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    for wanted in (reference(x, fmt, seed), reference(x.cuda(), fmt, seed).cpu()):
        same = (made.isnan() & wanted.isnan()) | (made.view(whole) == wanted.view(whole))
        if not same.all():
            sys.exit(f"{fmt.name} in {said(dtype)}: {int((~same).sum())} values are not the reference's")


def on_device(deed: Deed, copy: Deed, rounds: int, calls: int = 20) -> tuple[float, float]:
    """Median seconds of a copy and of the deed, by the device's own clock."""

    def seconds(what: Deed) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            what()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / calls

    seconds(copy), seconds(deed)
    pairs = [(seconds(copy), seconds(deed)) for _ in range(rounds)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gpu", action="store_true", help="measure the Triton kernels instead")
    parser.add_argument("--dry", action="store_true", help="print the table and write nothing")
    asked = parser.parse_args()
    if asked.gpu and not (torch.cuda.is_available() and find_spec("triton")):
        print("skipped: the GPU benchmark needs a CUDA device and the triton package")
        return
    warnings.simplefilter("ignore")
    lines = []
    for line in gpu(asked.rounds) if asked.gpu else cpu(asked.rounds):
        lines.append(line)
        print(line, flush=True)
    if not asked.dry:
        named = torch.cuda.get_device_name().lower().replace(" ", "-") if asked.gpu else "cpu"
        RESULTS.joinpath(f"{named}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
