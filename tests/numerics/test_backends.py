"""Every backend gives the reference's bits, on the tensors where roundings go wrong."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics import dispatch, native, native_build
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference, round_chunked
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import FORMATS, FP8, MXFP4, MXFP4_2D, MXFP8, MXFP8_E5M2, NVFP4, Format

SEED = (123, -456)
RULES = ("ceil", "rceil", "even", "even_e2m1", "uos", "round", "mse", "fouroversix")
ROUNDINGS = ("half_away", "half_added", "half_toward_zero", "toward_zero", "stochastic")
# The rules of tools: op by op in a dtype, with an epsilon.
TOOLS: list[Format] = [
    *(
        replace(MXFP4, scale_rule=rule, scale_math="tensor")
        for rule in ("floor", "ceil", "rceil", "even", "uos", "round")
    ),
    *(
        replace(MXFP4, scale_rule=rule, scale_epsilon=9.6e-7)
        for rule in ("floor", "ceil", "rceil", "even", "uos", "round")
    ),
    *(
        replace(MXFP4, scale_rule=rule, scale_epsilon=9.6e-7, scale_math=math, rounding="half_added")
        for rule in ("even", "uos")
        for math in ("tensor", "float32", "bfloat16")
    ),
    *(replace(MXFP4, scale_rule="fouroversix", scale_math=math) for math in ("tensor", "float32", "bfloat16")),
    *(replace(MXFP4, scale_rule="fouroversix", rounding=way) for way in ("half_added", "toward_zero", "stochastic")),
    *(replace(MXFP4, scale_rule="fouroversix", scale_math="tensor", block=(1, width)) for width in (16, 24)),
    replace(MXFP4_2D, scale_rule="even", scale_epsilon=9.6e-7, scale_math="tensor"),
    *(replace(MXFP4, scale_rule=rule, scale_min_exponent=-30) for rule in ("floor", "round")),
    replace(MXFP8, scale_min_exponent=-4),
    replace(MXFP8, scale_math="tensor", rounding="half_added"),
]
# A number of its own for each row of the last axis, or one that was seen before, of which some values here are larger.
FACTORS: list[Format] = [
    replace(fmt, factor=factor, calibrated=seen, rounding=way)
    for fmt in (NVFP4, FP8, replace(NVFP4, block=(1, 24)))
    for factor, seen in (("per_token", None), ("static", 1.7))
    for way in ("nearest_even", "stochastic")
]
KINDS: list[Format] = [
    *TOOLS,
    *FACTORS,
    *(replace(fmt, coarse=None) for fmt in FORMATS.values()),
    *(replace(MXFP4, scale_rule=rule) for rule in RULES),
    *(replace(fmt, rounding=way) for fmt in (MXFP4, MXFP4_2D, MXFP8, MXFP8_E5M2, NVFP4, FP8) for way in ROUNDINGS),
    *(replace(MXFP8, scale_rule=rule) for rule in ("ceil", "rceil", "even")),
    replace(MXFP4, block=(1, 24)),
    replace(MXFP4_2D, block=(8, 16)),
]


def seed_of(fmt: Format) -> tuple[int, int] | None:
    return SEED if fmt.rounding == "stochastic" else None


def said(fmt: Format) -> str:
    return f"{fmt.name}-{fmt.scale_rule}-{fmt.scale_epsilon}-{fmt.scale_math}-{fmt.rounding}-{fmt.block}-{fmt.factor}"


@pytest.fixture(scope="module")
def library():
    if native_build.compiler() is None:
        pytest.skip("no C compiler here")
    return native.typed(native_build.load() or native_build.build())


@pytest.mark.parametrize(
    "fmt",
    [replace(fmt, rounding=way) for fmt in (MXFP4, MXFP4_2D, NVFP4) for way in ("nearest_even", "stochastic")]
    + [FP8, replace(MXFP4, block=(1, 24)), replace(MXFP4, scale_rule="mse"), *TOOLS, *FACTORS],
    ids=said,
)
def test_chunks_equal_the_whole(fmt, edges, equal, monkeypatch):
    monkeypatch.setattr("fp4rl.numerics.reference.CHUNK", 1024)
    for dtype in (torch.bfloat16, torch.float64):
        for x in edges(dtype):
            assert equal(round_chunked(x, fmt, seed_of(fmt), torch.empty_like(x)), reference(x, fmt, seed_of(fmt)))


def known(fmt: Format) -> bool:
    """Whether the C kernels know it: not the search for the least error."""
    return fmt.scale != "none" and fmt.scale_rule != "mse"


@pytest.mark.parametrize("fmt", [fmt for fmt in KINDS if known(fmt)], ids=said)
def test_the_c_kernels_equal_the_reference(fmt, edges, equal, library):
    for dtype in (torch.float32, torch.bfloat16):
        for x in edges(dtype):
            assert native.supports(x, fmt)
            made = native.round_native(library, x, fmt, seed_of(fmt), torch.empty_like(x))
            assert equal(made, reference(x, fmt, seed_of(fmt)))


@pytest.mark.parametrize("math", ["exact", "tensor", "float32", "bfloat16"])
def test_four_over_six_in_c_is_right_where_both_errors_lie_close(math, equal, library):
    """Kind: rough sums that decide where only exact ones tell the errors apart."""
    fmt, generator = replace(MXFP4, scale_rule="fouroversix", scale_math=math), torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(40_000, 32, generator=generator)
        scale = torch.exp2((x.abs().amax(-1, keepdim=True) / 6).log2().round())
        errors = [
            (
                reference(torch.cat((x / by, torch.full_like(x, 6.0)), -1), replace(MXFP4, block=(1, 64)))[:, :32] * by
                - x
            )
            .square()
            .sum(-1)
            for by in (scale, 2 * scale)
        ]
        x = x[((errors[0] - errors[1]).abs() < 0.05 * errors[0])]
        assert len(x) > 1000
        x = (x * torch.exp2(torch.randint(-130, 125, (len(x), 1), generator=generator).float())).to(dtype)
        made = native.round_native(library, x, fmt, None, torch.empty_like(x))
        assert equal(made, reference(x, fmt))


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_2D, NVFP4, FP8, FORMATS["mxfp4_sr"], *FACTORS[:8]], ids=said)
def test_threads_share_a_tensor_without_a_seam(fmt, threads, equal, library, monkeypatch):
    monkeypatch.setattr(native, "ELEMENTS_PER_THREAD", 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in ((101, 77), (3, 45, 50)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        made = native.round_native(library, x, fmt, seed_of(fmt), torch.empty_like(x))
        assert equal(made, reference(x, fmt, seed_of(fmt)))


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_2D, NVFP4, FORMATS["mxfp4_sr"]], ids=said)
@pytest.mark.parametrize("name", ["reference", "chunked", "native"])
def test_a_forced_backend_rounds_halves_in_place_and_out_of_place_alike(name, fmt, equal, backend, library):
    backend(name)
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)).half()
    wanted = fake_quantize(x, fmt, generator=torch.Generator().manual_seed(1))
    assert equal(fake_quantize(x.clone(), fmt, generator=torch.Generator().manual_seed(1), out=x), wanted)
    seed = torch.randint(-(2**31), 2**31, (2,), generator=torch.Generator().manual_seed(1)).tolist()
    given = torch.randn(64, 160, generator=torch.Generator().manual_seed(0)).half()
    assert equal(wanted, reference(given, fmt, tuple(seed) if fmt.rounding == "stochastic" else None))


def test_a_rounding_that_loses_its_ties_would_be_seen(edges, equal):
    """The comparison of bits notices a kernel that rounds halves away where the format says even."""
    wrong = replace(MXFP4, rounding="half_away")
    assert not all(equal(reference(x, wrong), reference(x, MXFP4)) for x in edges(torch.float32))


def test_a_small_tensor_is_never_compiled_for(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "_PROCESS", dispatch._Process())
    monkeypatch.setattr(native_build, "load", lambda: None)
    monkeypatch.setattr(native_build, "build", lambda: pytest.fail("built for a small tensor"))
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled for a small tensor"))
    for _ in range(3):
        fake_quantize(torch.randn(64, 64), MXFP4)
    assert dispatch.backend_for(torch.randn(64, 64), MXFP4) == "reference"


def test_work_enough_builds_the_kernels_once_and_says_so(monkeypatch, library):
    heard, built = [], []
    monkeypatch.setattr(dispatch, "_PROCESS", dispatch._Process(announce=heard.append))
    monkeypatch.setattr(dispatch, "BUILD_AFTER", 1 << 20)
    monkeypatch.setattr(native_build, "load", lambda: None)
    monkeypatch.setattr(native_build, "build", lambda: built.append(1) or library)
    x = torch.empty(1 << 9, 1 << 9)
    named = [dispatch.backend_for(x, MXFP4) for _ in range(6)]
    assert named == ["chunked"] * 3 + ["native"] * 3
    assert len(built) == 1
    assert "once on this machine" in heard[0]


def test_without_a_compiler_everything_works_and_the_reason_is_told(monkeypatch):
    heard = []
    monkeypatch.setattr(dispatch, "_PROCESS", dispatch._Process(announce=heard.append))
    monkeypatch.setattr(native_build, "load", lambda: None)
    monkeypatch.setattr(native_build, "compiler", lambda: None)
    monkeypatch.setattr(dispatch, "BUILD_AFTER", 1 << 18)
    x = torch.randn(512, 512)
    made = [fake_quantize(x, MXFP4) for _ in range(2)]
    assert torch.equal(made[0], made[1])
    assert dispatch.backend_for(x, MXFP4) == "chunked"
    assert any("no C compiler" in line for line in heard)


def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(InvalidValueError, match="did you mean 'native'"):
        dispatch.use("nativ")


def test_forcing_triton_without_cuda_says_what_it_needs(monkeypatch):
    for kind in (None, torch.device("meta")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, kind=kind: kind)
        with pytest.raises(InvalidValueError, match="needs CUDA"):
            dispatch.use("triton")


def test_a_broken_source_is_reported_with_the_compilers_words(monkeypatch, tmp_path):
    if native_build.compiler() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "fake.c").write_text("this is no C")
    (tmp_path / "pack.c").write_text("")
    monkeypatch.setattr(native_build, "KERNELS", tmp_path)
    monkeypatch.setattr(native_build, "_folder", lambda: tmp_path)
    with pytest.raises(native_build.BuildFailed, match="error"):
        native_build.build()
