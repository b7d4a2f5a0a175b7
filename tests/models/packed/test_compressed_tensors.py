"""Folders that compressed-tensors wrote: every value is what its own decompressor makes of them."""

import json

import pytest
import torch
from packed_models import LINEAR, MIXED, by_compressed_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fp4rl.models.packed.folder import PackedFolder
from fp4rl.numerics.packing import Packed, dequantize
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.formats import E2M1

pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = {
    "MXFP4A16": ("w4a16", "mxfp4-pack-quantized"),
    "MXFP4": ("w4a4", "mxfp4-pack-quantized"),
    "NVFP4A16": ("nvfp4_w4a16", "nvfp4-pack-quantized"),
    "NVFP4": ("nvfp4_w4a4", "nvfp4-pack-quantized"),
    "MXFP8": ("w8a8", "mxfp8-quantized"),
}


@pytest.fixture(scope="module", params=[*SCHEMES, "mixed"])
def packed(request, tmp_path_factory):
    groups = MIXED if request.param == "mixed" else [(request.param, LINEAR)]
    return request.param, by_compressed_tensors(tmp_path_factory.mktemp("packed") / request.param, *groups)


def test_a_folder_says_what_it_holds_and_its_values_are_the_librarys(packed):
    name, folder = packed
    opened = PackedFolder.open(folder)
    mode, layout = SCHEMES.get(name, (None, "mxfp8-quantized and mxfp4-pack-quantized"))
    assert (opened.mode, opened.method) == (mode, f"compressed-tensors {layout}")
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    library(torch.arange(1, 9)[None])  # it decompresses before its first forward
    theirs = library.state_dict()
    assert len(opened.weights) == (6 if name == "mixed" else 7)
    for key, weight in opened.weights.items():
        assert weight.shape == theirs[key].shape
        assert opened.values(key, torch.bfloat16).equal(theirs[key])
        assert opened.values(key, torch.float32).equal(theirs[key].float())
        assert torch.cat(list(weight.rows(5))).equal(theirs[key])
        assert dequantize(opened.quantized(key)).equal(theirs[key])
        assert isinstance(opened.quantized(key), Packed) == (weight.fmt.element == E2M1)
    assert set(opened.tensors) | {"lm_head.weight"} == {key for key in theirs if not key.endswith("_scale")}


def test_each_group_of_a_mixture_says_its_own_inputs(tmp_path):
    opened = PackedFolder.open(by_compressed_tensors(tmp_path / "m", *MIXED))
    inputs = {name.split(".")[-2]: weight.input.name for name, weight in opened.weights.items()}
    names = {"q_proj": "mxfp8", "k_proj": "mxfp8", "v_proj": "mxfp8"}
    assert inputs == names | {"gate_proj": "mxfp4", "up_proj": "mxfp4", "down_proj": "mxfp4"}
    assert "model.layers.0.self_attn.o_proj.weight" in opened.plain


def test_a_static_factor_of_inputs_is_the_stored_one_to_the_bit(tmp_path):
    folder = by_compressed_tensors(tmp_path / "m", ("NVFP4", LINEAR))
    file = load_file(folder / "model.safetensors")
    for weight in PackedFolder.open(folder).weights.values():
        factor = file[weight.name.replace("weight", "input_global_scale")]
        assert weight.input.factor == "static"
        assert nvfp4_global(torch.tensor(weight.input.calibrated), E2M1) == factor


def test_inputs_in_a_format_that_is_not_known_here_are_told_in_words(tmp_path):
    opened = PackedFolder.open(by_compressed_tensors(tmp_path / "m", ("MXFP4XFP8", LINEAR)))
    (said,) = {weight.unread_input for weight in opened.weights.values()}
    assert said == "num_bits 8, type float, strategy group, group_size 128, dynamic True"
    assert opened.mode is None


def test_a_group_without_a_format_of_its_own_has_that_of_the_whole(tmp_path):
    folder = by_compressed_tensors(tmp_path / "m", ("MXFP4A16", LINEAR))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert PackedFolder.open(folder).mode == "w4a16"
