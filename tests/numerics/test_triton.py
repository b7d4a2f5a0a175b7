"""The Triton kernels give the reference's bits: in Triton's interpreter where there is no GPU, on the GPU where there
is one."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.reference import reference
from fp4rl.spec.formats import FORMATS, FP8, MXFP4, MXFP4_2D, MXFP8, MXFP8_E5M2, NVFP4, Format

triton_kernels = pytest.importorskip("fp4rl.numerics.triton_kernels", reason="the triton package is not here")

SEED = (123, -456)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MATHS = ("exact", "tensor", "float32")
FACTORS = [replace(NVFP4, factor="per_token"), replace(NVFP4, factor="static", calibrated=1.7)]
MAIN = [MXFP4, MXFP4_2D, NVFP4, FORMATS["mxfp4_sr"], *FACTORS]
ROUNDINGS = ("half_away", "half_added", "half_toward_zero", "toward_zero", "stochastic")
TOOLS: list[Format] = [  # the rules of tools: op by op in a dtype, with an epsilon
    *(
        replace(MXFP4, scale_rule=rule, scale_epsilon=9.6e-7, scale_math=math)
        for rule in ("even", "uos")
        for math in MATHS
    ),
    *(replace(MXFP4, scale_rule="fouroversix", scale_math=math) for math in MATHS),
    *(replace(MXFP4, scale_rule="fouroversix", rounding=way) for way in ("half_added", "stochastic")),
    replace(MXFP4_2D, scale_rule="fouroversix", scale_math="tensor", block=(8, 16)),
    replace(MXFP4, scale_rule="round", scale_math="float32", scale_min_exponent=-30),
    replace(MXFP8, scale_min_exponent=-4),
    replace(MXFP4, scale_rule="rceil", scale_math="float32", rounding="half_toward_zero"),
]
MINMAX, FOUR_OVER_SIX = TOOLS[1], replace(MXFP4, scale_rule="fouroversix", scale_math="tensor")
KINDS: list[Format] = [
    *TOOLS,
    *(replace(fmt, coarse=None) for fmt in FORMATS.values() if fmt not in MAIN and fmt.block),
    *(replace(MXFP4, scale_rule=rule) for rule in ("ceil", "rceil", "even", "even_e2m1", "uos", "round")),
    *(replace(fmt, rounding=way) for fmt in (MXFP4, MXFP4_2D, MXFP8, MXFP8_E5M2, NVFP4) for way in ROUNDINGS),
    *(replace(MXFP8, scale_rule=rule) for rule in ("ceil", "rceil", "even", "even_e2m1")),
    replace(MXFP4_2D, block=(8, 16)),
]
# The interpreter divides zero by zero in blocks that hold nothing, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def said(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.scale_rule}-{fmt.scale_epsilon}-{fmt.scale_math}-{fmt.rounding}-{fmt.block}-{fmt.factor}"


def seed_of(fmt: Format) -> tuple[int, int] | None:
    return SEED if fmt.rounding == "stochastic" else None


def by_triton(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    x = x.contiguous().to(DEVICE)
    assert triton_kernels.supports(x, fmt)
    return triton_kernels.round_triton(x, fmt, seed_of(fmt), torch.empty_like(x)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", [*MAIN, MINMAX, FOUR_OVER_SIX], ids=said)
def test_triton_equals_the_reference_on_every_edge(fmt, dtype, edges, equal):
    for x in edges(dtype):
        assert equal(by_triton(x, fmt), reference(x, fmt, seed_of(fmt)))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", KINDS, ids=said)
def test_triton_equals_the_reference_in_every_format_it_knows(fmt, edges, equal):
    for dtype in DTYPES:
        for x in edges(dtype):
            assert equal(by_triton(x, fmt), reference(x, fmt, seed_of(fmt)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", MAIN, ids=said)
def test_triton_equals_the_reference_over_a_million_values(fmt, dtype, equal):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1000, 1024, generator=generator)
    x *= torch.exp2(torch.randint(-140, 120, (1000, 1), generator=generator).float())
    assert equal(by_triton(x.to(dtype), fmt), reference(x.to(dtype), fmt, seed_of(fmt)))


def test_triton_writes_over_its_own_input(equal):
    x = torch.randn(33, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = reference(x.cpu(), MXFP4)
    assert equal(triton_kernels.round_triton(x, MXFP4, None, x).cpu(), wanted)


@pytest.mark.parametrize(
    ("fmt", "wrong"),
    [
        (MXFP4, {"CARRY": 1}),  # a scale that rises an ulp below the power of two
        (MXFP4, {"ROUNDING": 1}),  # ties away from zero
        (MXFP4, {"LEAST": 128 << 23}),  # no subnormals
        (MXFP4_2D, {"MAX_EXPONENT": 1}),
        (MXFP4, {"LARGEST": 4.0}),
        (NVFP4, {"ROUNDING": 1}),
        (FORMATS["mxfp4_sr"], {"ROUNDING": 0}),
        (MINMAX, {"STEPPED": False}),
        (replace(FOUR_OVER_SIX, scale_math="float32"), {"ERRORS": -1}),
    ],
    ids=lambda v: f"{v.name}-{v.scale_rule}" if isinstance(v, Format) else next(iter(v)).lower(),
)
def test_a_planted_fault_in_the_kernels_would_be_seen(fmt, wrong, edges, equal, monkeypatch):
    right = triton_kernels._constants(fmt)
    monkeypatch.setattr(triton_kernels, "_constants", lambda _: right | wrong)
    assert not all(equal(by_triton(x, fmt), reference(x, fmt, seed_of(fmt))) for x in edges(torch.float32))


def test_what_the_kernels_do_not_know_they_leave_to_the_reference():
    x = torch.empty(64, 64)
    assert not triton_kernels.supports(x, FP8)
    assert not triton_kernels.supports(x, FORMATS["bf16"])
    assert not triton_kernels.supports(x, replace(MXFP4, scale_rule="mse"))
    assert not triton_kernels.supports(x, replace(MXFP4, block=(1, 24)))
    assert not triton_kernels.supports(x.double(), MXFP4)


@triton_kernels.triton.jit
def _stored(bits, out, DTYPE: triton_kernels.tl.constexpr):
    at = triton_kernels.tl.arange(0, 8)
    triton_kernels._store_bits(out, at, triton_kernels.tl.load(bits + at), at < 8, DTYPE)


def test_every_nan_stays_a_nan_in_bfloat16():
    """A GPU makes 0x7fffffff, all bits set, whose rounding to sixteen bits carries through the sign: -0."""
    payloads = [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000, -0x7FFFFF]
    bits = torch.tensor([*payloads, 0x7F800000, 0x3F808000], dtype=torch.int32, device=DEVICE)
    out = torch.empty(8, dtype=torch.int16, device=DEVICE)
    _stored[(1,)](bits, out, triton_kernels.BFLOAT16)
    values = out.view(torch.bfloat16)
    assert values[:6].isnan().all()
    assert values[6:].tolist() == [float("inf"), 1.0]
