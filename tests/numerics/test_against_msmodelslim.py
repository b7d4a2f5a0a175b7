"""msModelSlim's MXFP4 weights, codes and scales: what the real package wrote of a model is what its rules give here."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from fp4rl.numerics.packing import pack_tensor
from fp4rl.spec.formats import MXFP4, Coarse

EPSILON = 9.6e-7
MINMAX = replace(MXFP4, scale_rule="even", scale_epsilon=EPSILON, scale_math="tensor", rounding="half_added")
CEIL_X = replace(MINMAX, scale_rule="uos")
FOUR_OVER_SIX = replace(MINMAX, scale_rule="fouroversix", scale_epsilon=0.0)
DUAL_SCALE = replace(MINMAX, scale_math="float32", coarse=Coarse(64))
FOLDERS = {
    "w4a4": MINMAX,
    "w4a8": MINMAX,
    "w4a4_ceil_x": CEIL_X,
    "w4a4_fouroversix": FOUR_OVER_SIX,
    "w4a4_dualscale": DUAL_SCALE,
}


def unlike(weight, fmt, stored, scales, dual=None):
    """How many codes, scales and FP32 scales of the packed weight differ from those that are stored."""
    made = pack_tensor(weight, fmt)
    both = (made.data ^ stored).int()
    codes = ((both & 0x0F) > 0).sum() + ((both & 0xF0) > 0).sum()
    differ = [int(codes), int((made.scales != scales).sum())]
    if dual is not None:
        differ.append(int((made.levels.coarse != dual).sum()))
    return differ


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_that_the_real_exporter_packed_is_reproduced(name, shared_data):
    folder = shared_data / "ascend_v1"
    if not folder.is_dir():
        pytest.skip("no ascend_v1 in the shared data")
    model = load_file(folder / "model" / "model.safetensors")
    packed = load_file(next((folder / name).glob("quant_model_weights-*.safetensors")))
    names = [key.removesuffix("_scale") for key in packed if key.endswith(".weight_scale")]
    assert len(names) >= 14
    for key in names:
        dual = packed.get(f"{key}_dual_scale")
        assert not any(unlike(model[key], FOLDERS[name], packed[key], packed[f"{key}_scale"], dual)), key
    another = replace(MXFP4, coarse=FOLDERS[name].coarse)
    assert sum(unlike(model[key], another, packed[key], packed[f"{key}_scale"])[0] for key in names) > 1000
