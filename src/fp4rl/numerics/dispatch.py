"""Which backend rounds a tensor: the fastest that is ready here and worth its start. All give the same bits.

    reference  plain PyTorch, the definition: tensors that fit a cache, and every format
    chunked    the reference in cache-sized pieces: large tensors where nothing is compiled
    native     the C kernels: every CPU tensor once they are built, which happens once a machine and when it pays
    triton     CUDA

A backend that does not know a format leaves it to the reference. None knows rotations, coarse scales and
fallbacks, which are done around them (`quantize`).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import Literal, get_args

import torch
from torch import Tensor

from fp4rl.numerics import native, native_build
from fp4rl.numerics.device import accelerator
from fp4rl.numerics.reference import CHUNK, reference, round_chunked
from fp4rl.numerics.rounding import Seed
from fp4rl.numerics.steps import settled
from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.formats import Format

Backend = Literal["auto", "reference", "chunked", "native", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
BUILD_AFTER = 1 << 22  # elements rounded before building pays: the reference takes a tenth of a second for them


def silent(_message: str) -> None:
    """Announce nothing: the default of `use`."""


@dataclass
class _Process:
    """What this process knows about its backends; `use` is the only thing that changes a choice."""

    chosen: Backend = "auto"
    announce: Callable[[str], None] = silent
    library: ctypes.CDLL | None = None
    looked: bool = False
    failure: str = ""
    seen: int = 0


_PROCESS = _Process()


def use(backend: str, announce: Callable[[str], None] = silent) -> None:
    """Force a backend for this process and `announce` what it compiles; InvalidValueError for one that cannot work."""
    if backend not in BACKENDS:
        raise InvalidValueError(f"no backend is called {backend!r}{nearest(backend, BACKENDS)}")
    if backend == "triton" and not (getattr(accelerator(), "type", None) == "cuda" and find_spec("triton")):
        raise InvalidValueError("the triton backend needs CUDA and the triton package; take auto")
    _PROCESS.chosen, _PROCESS.announce = backend, announce
    if backend == "native" and native_library(BUILD_AFTER) is None:
        _PROCESS.chosen = "auto"
        raise InvalidValueError(f"the native backend cannot be built: {_PROCESS.failure}; take auto or chunked")


def backend_for(x: Tensor, fmt: Format) -> Backend:
    """Return the backend that would round this tensor now."""
    wanted = _PROCESS.chosen
    if torch.compiler.is_compiling():  # inside a user's torch.compile the definition itself goes into the graph
        return "reference"
    if x.device.type == "cuda":
        return _on_cuda(x, fmt, wanted)
    if x.device.type != "cpu" or wanted == "reference":
        return "reference"
    if native.supports(x, fmt) and native_library(x.numel()):
        return "native"
    return "chunked" if x.numel() > CHUNK or wanted == "chunked" else "reference"


def round_tensor(x: Tensor, fmt: Format, seed: Seed | None, out: Tensor | None = None) -> Tensor:
    """Compute `reference(x, fmt, seed)` on the backend that fits, into `out` where one is given (it may be x)."""
    if hasattr(x, "to_local"):  # its parts have other blocks, and no memory of their own that a kernel could read
        raise InvalidValueError("a sharded tensor (DTensor) cannot be rounded in parts; gather it: x.full_tensor()")
    if fmt.fallback is not None:
        raise InvalidValueError(f"{fmt.name}: a backend rounds once; for a format with a fallback call fake_quantize")
    backend = backend_for(x, fmt)
    if backend == "reference":
        result = reference(x, fmt, seed)
        return result if out is None else out.copy_(result)
    source = x.contiguous()
    direct = out is not None and out.is_contiguous() and (out.data_ptr() == x.data_ptr() or not _overlap(out, x))
    target = out if out is not None and direct else torch.empty_like(source)
    _round_into(backend, source, fmt, seed, target)
    return target if out is None or direct else out.copy_(target)


def _round_into(backend: Backend, source: Tensor, fmt: Format, seed: Seed | None, target: Tensor) -> None:
    if backend == "native":
        assert _PROCESS.library is not None
        if source.dtype != torch.float16:
            native.round_native(_PROCESS.library, source, fmt, seed, target)
        else:
            wide, known = source.float(), settled(fmt, source.dtype)
            target.copy_(native.round_native(_PROCESS.library, wide, known, seed, wide))
    elif backend == "triton":
        from fp4rl.numerics import triton_kernels  # imports triton, which only CUDA machines need

        triton_kernels.round_triton(source, fmt, seed, target)
    else:
        round_chunked(source, fmt, seed, target)


def _on_cuda(x: Tensor, fmt: Format, wanted: Backend) -> Backend:
    if wanted in ("auto", "triton") and find_spec("triton"):
        from fp4rl.numerics import triton_kernels

        if triton_kernels.supports(x, fmt):
            return "triton"
    return "reference"


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def native_library(elements: int) -> ctypes.CDLL | None:
    """Return the C kernels, None without them; counts `elements`, and builds them once enough were rounded to pay."""
    if _PROCESS.chosen not in ("auto", "native"):
        return None
    if _PROCESS.library or _PROCESS.failure:
        return _PROCESS.library
    if not _PROCESS.looked:
        _PROCESS.looked = True
        built = native_build.load()
        _PROCESS.library = native.typed(built) if built else None
    _PROCESS.seen += elements
    if _PROCESS.library is None and _PROCESS.seen >= BUILD_AFTER:
        _build()
    return _PROCESS.library


def _build() -> None:
    _PROCESS.announce("compiling the rounding kernels, once on this machine ...")
    start = perf_counter()
    try:
        _PROCESS.library = native.typed(native_build.build())
    except (native_build.BuildFailed, OSError) as error:
        _PROCESS.failure = str(error)
        _PROCESS.announce(f"no C kernels: {error}; rounding with PyTorch alone")
        return
    _PROCESS.announce(f"compiled the rounding kernels in {perf_counter() - start:.1f} s")
