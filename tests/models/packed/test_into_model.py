"""A packed folder is loaded wherever a model folder is: its weights decoded, all else as it was saved."""

import json

import pytest
import torch
from packed_models import LINEAR, SMALL, as_gpt_oss, by_compressed_tensors, by_msmodelslim, edit_tensors, start
from safetensors.torch import load_file
from tiny_models import experts_in

from fp4rl.models.load import load, skeleton
from fp4rl.models.packed.folder import PackedFolder, checkpoint_tensors
from fp4rl.models.save import save
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    return by_compressed_tensors(tmp_path_factory.mktemp("m") / "m", ("MXFP4", LINEAR))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_logits_are_those_of_the_unquantized_model_with_these_values(dtype, compressed, tmp_path):
    own, tokenizer = start(SMALL)
    packed = PackedFolder.open(compressed)
    with torch.no_grad():
        for name in packed.weights:
            own.get_parameter(name).copy_(packed.values(name, torch.bfloat16))
    own.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (model, tokenizer), (own, _) = load(compressed, dtype), load(tmp_path, dtype)
    ids = torch.arange(1, 30)[None]
    assert torch.equal(model(ids).logits, own(ids).logits)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.pad_token is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.name_or_path == str(compressed)


@pytest.mark.parametrize("make", [by_msmodelslim, as_gpt_oss])
def test_folders_of_other_tools_load_and_save_unquantized(make, tmp_path):
    folder, out = make(tmp_path / "m"), tmp_path / "saved"
    packed = PackedFolder.open(folder)
    model, tokenizer = load(folder, "float32")
    held = {name: weight.dtype for name, weight in model.named_parameters()}
    assert set(held.values()) == {torch.float32}
    for name in packed.weights:
        assert model.get_parameter(name).equal(packed.values(name, torch.float32))
    assert {name: tuple(w.shape) for name, w in skeleton(folder).named_parameters()} == {
        name: tuple(w.shape) for name, w in model.named_parameters()
    }
    save(model, tokenizer, out, folder)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    again, _ = load(out)
    assert all(again.get_parameter(name).equal(weight) for name, weight in model.named_parameters())
    assert set(checkpoint_tensors(out)) <= set(packed.tensors)


def test_experts_that_lie_one_by_one_are_stacked(tmp_path, compressed):
    """As engines have them: each expert's matrices packed for themselves."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp
    from safetensors.torch import save_file

    tokenizer, scheme = build_tokenizer(), preset_name_to_scheme("MXFP4A16", ["Linear"])
    model = experts_in("qwen3_moe", "cpu", len(tokenizer)).bfloat16()
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors, right = load_file(folder / "model.safetensors"), {}
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    for name in [name for name in tensors if ".experts." in name]:
        weight, layer = tensors.pop(name), name.removesuffix(".weight")
        scale, _ = compute_dynamic_scales_and_zp(weight, scheme.weights, None, None)
        made = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in made.items()}
        right[name] = compressor.decompress(made, scheme)["weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = json.loads((compressed / "config.json").read_text())["quantization_config"]
    said["config_groups"]["group_0"] |= {"input_activations": None, "targets": ["re:.*experts.*"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    loaded, _ = load(folder, "bfloat16")
    gate_up = loaded.model.layers[0].mlp.experts.gate_up_proj
    for expert, matrix in enumerate(gate_up):
        both = [right[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up")]
        assert matrix.equal(torch.cat(both).bfloat16())


def test_a_tensor_that_the_model_has_no_place_for_is_named(compressed, tmp_path):
    folder = by_msmodelslim(tmp_path / "m")
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.mul_scale": torch.ones(32)}))
    file = folder / "quant_model_description.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model.norm.mul_scale": "FLOAT"}))
    with pytest.raises(InvalidValueError, match=r"has no place for 1 tensors \('model.norm.mul_scale'\)"):
        load(folder)


def test_what_is_wrong_with_a_packed_weight_is_said_while_it_loads(tmp_path):
    folder = by_msmodelslim(tmp_path / "m")
    edit_tensors(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_scale"][0, :1].fill_(255))
    with pytest.raises(InvalidValueError, match=r"up_proj.weight_scale holds 1 scales that are no numbers") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
