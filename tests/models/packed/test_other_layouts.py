"""Folders of msModelSlim, ModelOpt and gpt-oss: values bit for bit those of the layout, or of its own library."""

import pytest
import torch
from packed_models import WEIGHTS, as_gpt_oss, by_modelopt, by_msmodelslim, stated
from safetensors.torch import load_file

from fp4rl.models.packed.folder import PackedFolder
from fp4rl.spec.formats import Coarse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED = ("w4a4", "w4a8", "w4a4_dualscale", "w4a4_fouroversix", "w4a4_ceil_x")


def unlike_the_statement(folder, opened, columns=64):
    """Names of 4-bit weights whose values are not those of the layout, stated in float64."""
    file = load_file(folder / WEIGHTS)
    wrong = []
    for name, weight in opened.weights.items():
        if weight.fmt.element.bits == 4:
            layer = name.removesuffix(".weight")
            dual = file.get(f"{layer}.weight_dual_scale")
            right = stated(file[name], file[f"{layer}.weight_scale"], dual, columns).float()
            wrong += [name for dtype in DTYPES if not opened.values(name, dtype).equal(right.to(dtype))]
    return wrong


def test_a_folder_of_msmodelslim_with_every_type_of_layer(tmp_path):
    folder = by_msmodelslim(tmp_path / "m")
    opened = PackedFolder.open(folder)
    assert (opened.method, opened.mode) == ("AscendV1 W4A4_MXFP4_DUALSCALE", None)
    formats = {name.split(".")[-2]: (w.fmt.name, w.input.name) for name, w in opened.weights.items()}
    mx = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("mxfp8", "mxfp8"))
    mx |= {"o_proj": ("mxfp4", "mxfp8"), "gate_proj": ("mxfp4", "mxfp4"), "up_proj": ("mxfp4", "mxfp4")}
    assert formats == mx | {"down_proj": ("mxfp4_dual", "mxfp4_dual")}
    down = opened.weights["model.layers.0.mlp.down_proj.weight"]
    assert down.fmt.coarse == down.input.coarse == Coarse(64)  # 96 columns: one dual scale and a short one
    assert unlike_the_statement(folder, opened) == []
    file, name = load_file(folder / WEIGHTS), "model.layers.0.self_attn.q_proj.weight"
    scale = (2.0 ** (file[f"{name}_scale"].double() - 127)).repeat_interleave(32, -1)
    assert opened.values(name, torch.float32).equal((file[name].double() * scale).float())


@pytest.mark.parametrize("name", SHARED)
def test_folders_of_the_shared_model(name, shared_data):
    folder = shared_data / "ascend_v1" / name
    opened = PackedFolder.open(folder)
    assert opened.mode == ("w4a8" if name == "w4a8" else "w4a4")
    assert len(opened.weights) == 14
    assert unlike_the_statement(folder, opened) == []


def test_a_folder_of_modelopt_is_multiplied_out_in_its_own_order(tmp_path):
    pytest.importorskip("modelopt", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    folder = by_modelopt(tmp_path / "m")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    opened, file = PackedFolder.open(folder), load_file(folder / "model.safetensors")
    assert (opened.method, opened.mode, len(opened.weights)) == ("modelopt NVFP4", "nvfp4_w4a4", 7)
    order_matters = 0
    for name, weight in opened.weights.items():
        scale, factor = file[f"{name}_scale"], file[f"{name}_scale_2"]
        for dtype in DTYPES:
            theirs = NVFP4QTensor(weight.shape, dtype, file[name]).dequantize(
                dtype=dtype, scale=scale, double_scale=factor, block_sizes={-1: 16}
            )
            assert opened.values(name, dtype).equal(theirs)
        divided = scale.float() / factor.reciprocal()
        order_matters += int((divided != scale.float() * factor).sum())
        assert weight.input.factor == "static"
    assert order_matters > 0
    assert not any(name.endswith("scale") for name in opened.plain)


def test_the_experts_of_gpt_oss(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = as_gpt_oss(tmp_path / "m")
    opened, file = PackedFolder.open(folder), load_file(folder / "model.safetensors")
    assert (opened.method, opened.mode, len(opened.weights)) == ("mxfp4 (gpt-oss)", "w4a16", 2)
    for name, weight in opened.weights.items():
        for dtype in DTYPES[:2]:
            theirs = convert_moe_packed_tensors(file[f"{name}_blocks"], file[f"{name}_scales"], dtype=dtype)
            assert opened.values(name, dtype).equal(theirs)
        assert weight.shape == theirs.shape
        assert torch.cat(list(weight.rows(7))).equal(weight.read().flatten(0, 1))
