"""A packed folder that is damaged, contradicts itself, or is not read here, is refused in one line that names it."""

import json

import pytest
import torch
from packed_models import (
    LINEAR,
    as_gpt_oss,
    by_compressed_tensors,
    by_modelopt,
    by_msmodelslim,
    edit_config,
    edit_tensors,
    weights_file,
)

from fp4rl.models.packed.folder import PackedFolder, opened
from fp4rl.spec.errors import InvalidValueError, UserError

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def compressed(tmp_path):
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    return by_compressed_tensors(tmp_path / "m", ("NVFP4", LINEAR))


@pytest.fixture
def ascend(tmp_path):
    return by_msmodelslim(tmp_path / "m")


def read_all(folder):
    packed = PackedFolder.open(folder)
    for name in packed.weights:
        packed.values(name, torch.float32)


def refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)


def edit_description(folder, change):
    file = folder / "quant_model_description.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_quantization(folder, change):
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(content)
    edit_config(folder, quantization_config=content)


def test_an_unquantized_folder_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert opened(tmp_path) is None
    with pytest.raises(InvalidValueError, match="its weights are not packed"):
        PackedFolder.open(tmp_path)


PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing(compressed, part):
    edit_tensors(compressed, lambda tensors: tensors.pop(f"{Q}.{part}"))
    refused(compressed, rf"{Q}\.{part} is missing, which .* needs; copy the checkpoint anew")


WRONG = {
    "transposed": ("weight_scale", lambda t: t.T.contiguous(), r"weight_scale is \[2, 32\], but .* needs \[32, 2\]"),
    "of groups of 32": ("weight_scale", lambda t: t[:, :1].contiguous(), r"is \[32, 1\], but .* in groups of 16 needs"),
    "of another dtype": ("weight_scale", lambda t: t.float(), "weight_scale is of float32; nvfp4 has float8_e4m3fn"),
    "not a number": ("weight_scale", lambda t: (t.float() * torch.nan).to(t.dtype), "64 scales that are no numbers"),
    "several factors": ("weight_global_scale", lambda t: t.repeat(2), r"weight_global_scale is \[2\], not one number"),
    "a factor of 0": ("weight_global_scale", lambda t: t * 0, "weight_global_scale is 0, not a number above 0"),
    "an input of 0": ("input_global_scale", lambda t: t * 0, r"input_global_scale is \[0.0\], not one number above 0"),
    "a vector": ("weight_packed", lambda t: t.flatten(), r"weight_packed is \[512\], not a matrix"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_part_that_does_not_fit(compressed, wrong):
    part, change, message = WRONG[wrong]
    edit_tensors(compressed, lambda tensors: tensors.update({f"{Q}.{part}": change(tensors[f"{Q}.{part}"])}))
    refused(compressed, message)


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_another_layout(compressed):
    edit_tensors(compressed, lambda tensors: tensors.update({f"{Q}.weight_zero_point": torch.zeros(1)}))
    assert f"{Q}.weight_zero_point" in PackedFolder.open(compressed).plain  # `load` says that nothing takes it
    edit_quantization(compressed, lambda said: said["config_groups"]["group_0"].update(input_activations=None))
    refused(compressed, r"input_global_scale is not part of nvfp4-pack-quantized")


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_cut_short(compressed):
    whole = weights_file(compressed).read_bytes()
    weights_file(compressed).write_bytes(whole[:-64])
    with pytest.raises(InvalidValueError, match=r"the file ends inside '.*'; copy it anew"):
        PackedFolder.open(compressed)  # before anything is read from it


SAID = {
    "another scheme": (
        lambda s: s["config_groups"]["group_0"].update(format="pack-quantized"),
        "pack-quantized is not",
    ),
    "integers": (
        lambda s: s["config_groups"]["group_0"]["weights"].update(type="int"),
        "said to be of num_bits 4, type",
    ),
    "groups of 32": (
        lambda s: s["config_groups"]["group_0"]["weights"].update(group_size=32),
        "group_size 32, which that format is not",
    ),
    "a layer under ignore": (lambda s: s.update(ignore=["re:.*q_proj"]), f"{Q} is packed, but .* under `ignore`"),
    "no group": (lambda s: s["config_groups"]["group_0"].update(targets=["re:.*mlp.*"]), "no group of .* takes it"),
    "a rotation": (lambda s: s.update(transform_config={"config_groups": {"u": {}}}), "has a transform_config"),
    "a rounded cache": (lambda s: s.update(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme"),
    "no words": (lambda s: s.update(config_groups=3), "cannot be read"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", SAID)
def test_a_configuration_that_says_something_else(compressed, wrong):
    change, message = SAID[wrong]
    edit_quantization(compressed, change)
    refused(compressed, message)


def test_a_type_that_the_description_does_not_list(ascend):
    edit_description(ascend, lambda said: said.pop(f"{Q}.weight_scale"))
    refused(ascend, rf"{Q}\.weight_scale is in the files, but quant_model_description.json does not list it")


def test_a_tensor_that_the_description_lists_and_no_file_holds(ascend):
    edit_tensors(ascend, lambda tensors: tensors.pop("model.norm.weight"))
    refused(ascend, r"model\.norm\.weight is listed in quant_model_description.json, but no file holds it")


ABOUT = {
    "another type": ({f"{Q}.weight": "W8A8_DYNAMIC"}, rf"{Q}\.weight is of type W8A8_DYNAMIC, which is not read here"),
    "no type": ({f"{Q}.weight": 3}, rf"{Q}\.weight is of type 3, which is not read here"),
    "other groups": ({"group_size": 64}, "says group_size 64; MX formats have groups of 32"),
    "a rotation": ({"metadata": {"quarot": {"q": 1}}}, "names rotations or options"),
    "a type too narrow": ({f"{Q}.weight": "W4A4_MXFP4"}, "is of float8_e4m3fn; mxfp4 has uint8"),
    "a weight left plain": (
        {f"{DOWN}.weight": "FLOAT"},
        r"weight_\w+ is of type W4A4_MXFP4_DUALSCALE, which has no such",
    ),
    "no dual scale": ({f"{DOWN}.weight": "W4A4_MXFP4"}, "weight_dual_scale is of type W4A4_MXFP4_DUALSCALE, which has"),
}


@pytest.mark.parametrize("wrong", ABOUT)
def test_a_description_that_says_something_else(ascend, wrong):
    change, message = ABOUT[wrong]
    edit_description(ascend, lambda said: said.update(change))
    refused(ascend, message)


JUNK = (None, 3, -0.5, "x", "re:(", [], {}, [3], {"a": 3}, True)


def places(content, place=()):
    yield place
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places(content[key], (*place, key))


def with_junk(content, place, junk):
    if not place:
        return junk
    changed = content.copy()
    changed[place[0]] = with_junk(content[place[0]], place[1:], junk)
    return changed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["compressed", "ascend"])
def test_whatever_stands_anywhere_in_a_description_is_read_or_refused_in_one_line(layout, request):
    folder = request.getfixturevalue(layout)
    file = folder / ("config.json" if layout == "compressed" else "quant_model_description.json")
    whole = json.loads(file.read_text())
    said, refusals = whole.get("quantization_config", whole), []
    for number, place in enumerate(places(said)):
        for junk in JUNK[number % 2 :: 2]:
            changed = with_junk(said, place, junk)
            file.write_text(json.dumps({**whole, "quantization_config": changed} if said is not whole else changed))
            try:
                opened(folder)
            except UserError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert not any("\n" in line for line in refusals)


def test_an_exponent_of_255(ascend):
    edit_tensors(ascend, lambda tensors: tensors[f"{DOWN}.weight_scale"][3, 1:2].fill_(255))
    refused(ascend, "weight_scale holds 1 scales that are no numbers")


def test_dual_scales_that_fit_no_width(ascend):
    edit_tensors(ascend, lambda tensors: tensors.update({f"{DOWN}.weight_dual_scale": torch.ones(32, 5, 1)}))
    refused(ascend, "no one number of columns fits the shapes of all its dual scales")


def test_experts_without_scales_or_in_other_blocks(tmp_path):
    folder = as_gpt_oss(tmp_path / "m")
    name = "model.layers.0.mlp.experts.down_proj"
    edit_tensors(
        folder, lambda tensors: tensors.update({f"{name}_scales": tensors[f"{name}_scales"][..., :2].contiguous()})
    )
    refused(folder, r"_scales is \[2, 64, 2\], but .* needs \[2, 64, 3\]")
    edit_tensors(folder, lambda tensors: tensors.pop(f"{name}_scales"))
    refused(folder, "down_proj_scales is missing, which .*_blocks needs")
    edit_tensors(
        folder, lambda tensors: tensors.update({f"{name}_blocks": tensors[f"{name}_blocks"][..., :8].contiguous()})
    )
    refused(folder, r"blocks of 32 are \[.., .., .., 16\] bytes")


MODELOPT = {"FP8": "modelopt FP8 is not read here; NVFP4", "None": "modelopt None is not read here"}


@pytest.mark.parametrize("algorithm", MODELOPT)
def test_other_algorithms_of_modelopt(ascend, algorithm):
    (ascend / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    refused(ascend, MODELOPT[algorithm])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"quant_algo": "W4A16_NVFP4"}, r"config.json says NVFP4, and hf_quant_config.json W4A16_NVFP4"),
        ({"group_size": 64}, "group_size 64"),
    ],
    ids=str,
)
def test_two_statements_of_modelopt_that_differ(change, why, tmp_path):
    pytest.importorskip("modelopt", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    file = by_modelopt(tmp_path / "m") / "hf_quant_config.json"
    said = json.loads(file.read_text())
    said["quantization"] |= change
    file.write_text(json.dumps(said))
    with pytest.raises(InvalidValueError, match=why):
        PackedFolder.open(tmp_path / "m")
