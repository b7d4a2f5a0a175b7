"""What the tests of numerics share: the tensors on which roundings go wrong, and equality of bits."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fp4rl.numerics import dispatch

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits, the sign of zero among them; any NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = BITS[a.dtype]
    return bool(((a.isnan() & b.isnan()) | (a.view(bits) == b.view(bits))).all())


@pytest.fixture(scope="session")
def equal() -> Callable[[Tensor, Tensor], bool]:
    """Equality of bits."""
    return _equal


def _edges() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield normal(67, 172)  # ragged
    yield normal(3, 50, 70)
    yield normal(33)
    yield normal(40, 96) * torch.exp2(torch.randint(-140, 120, (40, 96), generator=generator).float())
    broken = normal(70, 100)
    broken[3, 5], broken[40, 99], broken[41, 0] = torch.nan, torch.inf, -torch.inf
    broken[50], broken[51] = 0.0, -0.0
    yield broken
    yield torch.zeros(5, 64)
    yield -torch.zeros(5, 64)
    ends = torch.exp2(torch.arange(-149, 128).float())  # both ends of the float and of the scale range
    yield ends[:, None] * torch.tensor([1.0, 1.25, 1.5, 1.75, 1.8125, 1.999]).repeat(6)
    near = torch.exp2(torch.arange(-40, 40).float())
    for towards in (0.0, torch.inf):  # an ulp below and above every power of two
        yield torch.nextafter(near, torch.tensor(towards)).repeat(32, 1).t().contiguous()
    yield torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0]).repeat(30, 4)  # ties
    two_level = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8, 4)
    two_level[0] = 2688.0  # makes NVFP4's factor one, so that the rows below are ties of it
    yield two_level * torch.exp2(-torch.arange(8.0))[:, None]
    outlier = 0.01 * normal(8, 64)
    outlier[:, 7] = 1e6
    yield outlier


@pytest.fixture(scope="session")
def edges() -> Callable[[torch.dtype], list[Tensor]]:
    """Tensors of a dtype with ties, zeros, NaN, ragged shapes, outliers, and both ends of the range."""
    return lambda dtype: [x.to(dtype) for x in _edges()]


@pytest.fixture(scope="session")
def hard() -> ModuleType:
    """hard_values.py: what the peers are compared on."""
    where = Path(__file__).with_name("hard_values.py")
    spec = importlib.util.spec_from_file_location("hard_values", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def peer() -> Callable[[str], ModuleType]:
    """Imports a module of another quantizer, whose own warnings are none of ours; skips where it is not installed."""

    def load(name: str) -> ModuleType:
        pytest.importorskip(name.split(".")[0], reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)

    return load


@pytest.fixture
def backend() -> Iterator[Callable[[str], None]]:
    """Forces a backend for one test."""
    yield dispatch.use
    dispatch.use("auto")
