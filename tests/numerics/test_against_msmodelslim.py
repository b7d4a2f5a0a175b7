"""msModelSlim's MXFP4 and MXFP8 weights: codes and scales equal those of the real package, byte for byte.

Known differences, each looked at below: a weight of -0 loses its sign there; a run of zeros under a dual scale becomes
NaN there; and four-over-six adds errors in float32 in an order that hangs on the processor, so that it may take the
other of two scales whose errors agree to a millionth.
"""

import importlib.util
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_msmodelslim import QWEN2, clean, layers, packed_by_it, programs
from safetensors.torch import load_file, save_file

from fp4rl.numerics.packing import pack_tensor, quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.formats import MXFP4, MXFP4_DUAL, MXFP8

DATA = Path(__file__).parents[1] / "data" / "msmodelslim"
METHODS = {
    "minmax": deployment_named("vllm_ascend").at("weight", MXFP4),
    "mxfp8": deployment_named("vllm_ascend").at("weight", MXFP8),
    "ceil_x": deployment_named("vllm_ascend_ceil_x").at("weight", MXFP4),
    "fouroversix": deployment_named("vllm_ascend_fouroversix").at("weight", MXFP4),
    "dualscale": deployment_named("vllm_ascend_dualscale_64").at("weight", MXFP4),
}
MINMAX = METHODS["minmax"]
FOLDERS = {
    "w4a4": "minmax",
    "w4a8": "minmax",
    "w4a4_ceil_x": "ceil_x",
    "w4a4_fouroversix": "fouroversix",
    "w4a4_dualscale": "dualscale",
}
DTYPES = (torch.float32, torch.bfloat16)


def unlike(weight, fmt, stored, scales, dual=None):
    """Where the packed weight differs: its codes, E8M0 scales and FP32 scales, as masks."""
    if fmt.element.bits == 8:
        made = quantize(weight, fmt)
        return made.codes != stored, made.scales != scales, torch.zeros(1)
    made = pack_tensor(weight, fmt)
    both = (made.data ^ stored).int()
    codes = torch.stack((both & 0x0F, both & 0xF0), -1).flatten(-2) != 0
    return codes, made.scales != scales, torch.zeros(1) if dual is None else made.levels.coarse != dual


def parts(packed, key):
    return [packed.get(f"{key}/{part}") for part in ("codes", "scales", "dual")]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_that_the_real_exporter_packed_is_reproduced(name, shared_data):
    folder = shared_data / "ascend_v1"
    if not folder.is_dir():
        pytest.skip("no ascend_v1 in the shared data")
    fmt, model = METHODS[FOLDERS[name]], load_file(folder / "model" / "model.safetensors")
    packed = load_file(next((folder / name).glob("quant_model_weights-*.safetensors")))
    keys = [key.removesuffix("_scale") for key in packed if key.endswith(".weight_scale")]
    assert len(keys) >= 14
    for key in keys:
        stored = (packed.get(key + end) for end in ("", "_scale", "_dual_scale"))
        assert not any(part.any() for part in unlike(model[key], fmt, *stored)), key
    plain = replace(MXFP4, coarse=fmt.coarse)
    assert sum(unlike(model[key], plain, packed[key], packed[f"{key}_scale"])[0].sum() for key in keys) > 1000


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_the_real_package_packed_are_reproduced(dtype, method):
    """Made by `values.py` and `pack.py` beside the file: sizes 1e-6 to 1e3, zeros, thresholds."""
    weight = load_file(DATA / "weights.safetensors")[str(dtype)]
    stored = parts(load_file(DATA / "packed.safetensors"), f"{dtype}/{method}")
    assert weight.dtype == dtype
    assert not any(part.any() for part in unlike(weight, METHODS[method], *stored))


@pytest.mark.parametrize(
    ("dtype", "method", "change"),
    [
        (torch.float32, "minmax", {"scale_epsilon": 0.0}),
        (torch.float32, "minmax", {"rounding": "nearest_even"}),
        (torch.float32, "minmax", {"rounding": "half_away"}),  # one number below a half is carried up there
        (torch.bfloat16, "minmax", {"scale_math": "float32"}),
        (torch.bfloat16, "ceil_x", {"scale_math": "exact"}),
        (torch.bfloat16, "fouroversix", {"scale_math": "exact"}),
        (torch.float32, "fouroversix", {"scale_rule": "mse", "scale_math": "exact"}),
        (torch.bfloat16, "dualscale", {"scale_math": "tensor"}),
        (torch.bfloat16, "mxfp8", {"scale_math": "float32"}),
        (torch.bfloat16, "mxfp8", {"rounding": "nearest_even"}),
    ],
    ids=str,
)
def test_another_rule_would_be_seen(dtype, method, change):
    weight = load_file(DATA / "weights.safetensors")[str(dtype)]
    stored = parts(load_file(DATA / "packed.safetensors"), f"{dtype}/{method}")
    assert unlike(weight, replace(METHODS[method], **change), *stored)[0].any()


@pytest.fixture(scope="module")
def values():
    spec = importlib.util.spec_from_file_location("msmodelslim_weights", DATA / "values.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def live():
    return programs()


@pytest.fixture
def packed_there(live, tmp_path):
    """Packs tensors by the real package: {name: weight} -> {name/method/part: tensor}."""

    def pack(weights):
        save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "weights.safetensors")
        command = [live / "python", DATA / "pack.py", tmp_path / "weights.safetensors", tmp_path / "packed.safetensors"]
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=clean())
        return load_file(tmp_path / "packed.safetensors")

    return pack


def nearly_equal_errors(weight, blocks, fmt):
    """Whether the two scales of four-over-six make errors that agree to a millionth, in the blocks that differ."""
    x = weight.view(-1, 32)[blocks.flatten()].double()
    errors = []
    for largest in (6, 4):
        scale = torch.exp2((x.abs().amax(-1, keepdim=True) / largest).log2().round())
        under = torch.cat((x / scale, torch.full((len(x), 1), 6.0)), -1)  # the 6 makes the scale one
        made = fake_quantize(under, replace(fmt, scale_rule="rceil", scale_math="exact", block=(1, 33)))[:, :32] * scale
        errors.append((made - x).square().sum(-1))
    return bool(((errors[0] - errors[1]).abs() <= 1e-6 * errors[0]).all())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_millions_of_weights_are_packed_as_the_live_package_packs_them(dtype, values, packed_there, record_property):
    compared = near_ties = 0
    for seed in range(5):
        weights = dict(values.weights(dtype, 192, 512, seed))
        packed = packed_there(weights)
        for method, fmt in METHODS.items():
            for name, weight in weights.items():
                codes, scales, dual = unlike(weight, fmt, *parts(packed, f"{name}/{method}"))
                if method == "dualscale":
                    empty = (weight.view(192, -1, 64) == 0).all(-1)  # NaN there
                    codes = codes & ~empty.repeat_interleave(64, -1)
                    scales, dual = scales & ~empty.repeat_interleave(2, -1), dual & ~empty.view(dual.shape)
                if method == "fouroversix" and scales.any():
                    assert nearly_equal_errors(weight, scales, fmt), name
                    near_ties += int(scales.sum())
                    codes, scales = codes & ~scales.repeat_interleave(32, -1), scales & False
                assert not codes.any(), (method, name)
                assert not scales.any(), (method, name)
                assert not dual.any(), (method, name)
                compared += weight.numel()
    assert compared >= 20_000_000
    assert near_ties <= 200
    record_property("seen", f"{dtype}: {compared:,} codes equal; {near_ties} blocks of nearly equal errors")


@pytest.mark.slow
def test_what_differs_from_the_live_package_and_why(packed_there):
    weight = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    weight[0, :3], weight[1, :64] = torch.tensor([-0.0, 0.0, -1e-6]), 0.0
    packed = packed_there({"w": weight})
    assert [int(packed["w/minmax/codes"][0, 0]), int(packed["w/minmax/codes"][0, 1]) & 15] == [0, 8]  # -0 becomes 0
    mine = pack_tensor(weight, MINMAX).data
    assert [int(mine[0, 0]), int(mine[0, 1]) & 15] == [8, 8]
    assert torch.equal(mine[:, 2:], packed["w/minmax/codes"][:, 2:])
    assert packed["w/dualscale/dual"][1, 0] == 0  # zeros are divided by it
    dual = pack_tensor(weight, METHODS["dualscale"])
    assert not dual.data[1, :32].any()
    assert torch.equal(dual.data[:, 32:], packed["w/dualscale/codes"][:, 32:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_folder_is_packed_as_the_live_command_packs_it(dtype, live, shared_data, tmp_path):
    source = shared_data / "ascend_v1" / "model"
    if not source.is_dir():
        pytest.skip("no ascend_v1 in the shared data")
    shutil.copytree(source, tmp_path / "model")
    model = {key: value.to(dtype) for key, value in load_file(source / "model.safetensors").items()}
    save_file(model, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    packed_by_it(live, QWEN2, tmp_path / "model", tmp_path / "out", layers("mxfp4", "mxfp4"))
    packed = load_file(next((tmp_path / "out").glob("quant_model_weights-*.safetensors")))
    keys = [key.removesuffix("_scale") for key in packed if key.endswith(".weight_scale")]
    assert len(keys) >= 14
    for key in keys:
        assert not any(part.any() for part in unlike(model[key], MINMAX, packed[key], packed[f"{key}_scale"])), key


def test_the_plain_dual_scale_keeps_its_quotient_in_the_tensors_dtype():
    """Ascend's operation against msModelSlim's: with a float32 quotient 5 of 1,000 BF16 weights differ."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = replace(MXFP4_DUAL, scale_rule="even", scale_math="float32")
    cast = replace(MXFP4_DUAL, scale_rule="even")
    assert 0 < (fake_quantize(x, kept) != fake_quantize(x, cast)).sum() < 0.02 * x.numel()
