"""Multimodal folders: their text model is trained, rounded and scored on text; what sees stays as it is and is kept."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText

from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load, skeleton
from fp4rl.models.positions import forward_inputs
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.targets import noisy_weights
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise

TEXT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TEXT |= {"intermediate_size": 96, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEEING = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "depth": 4}
TOKENS = {f"{name}_token_id": 150 + n for n, name in enumerate(("image", "video", "vision_start", "vision_end"))}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
GEMMA_SEEING = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES = {
    "Gemma3": {
        "text_config": TEXT,
        "vision_config": GEMMA_SEEING | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 150,
    },
    "Qwen2_5_VL": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": SEEING | {"fullatt_block_indexes": [1]},
        **TOKENS,
    },
    "Qwen3VL": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": SEEING | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **TOKENS,
    },
}
IDS = torch.arange(10, 34).view(2, 12)
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    model = getattr(transformers, f"{request.param}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_text_model_has_its_own_layer_numbers_and_what_sees_is_left_with_the_reason(folder):
    table = resolve(skeleton(folder), Injection.named("w4a4"))
    names = [f"model.language_model.layers.{layer}.{end}" for layer in range(3) for end in PROJECTIONS]
    assert [plan.name for plan in table.plans] == names
    assert [plan.site.layer for plan in table.plans] == [layer for layer in range(3) for _ in PROJECTIONS]
    seeing = [left for left in table.left_out if left.site.name.startswith("model.vis") and left.site.kind == "linear"]
    assert len(seeing) >= 4 * 4
    assert {left.reason for left in seeing} == {"no text passes through it (vision, audio, projector)"}


def test_layers_by_number_are_those_of_the_text_model(folder):
    table = resolve(skeleton(folder), Injection.model_validate({"mode": "w4a16", "targets": {"layers": [-1]}}))
    assert {plan.site.layer for plan in table.plans} == {2}


def test_noise_goes_on_norms_that_text_passes_through(folder):
    names = {weight.name for weight in noisy_weights(skeleton(folder), Noise())}
    assert "model.language_model.norm.weight" in names
    assert all(name.startswith("model.language_model.") for name in names)


def test_text_is_computed_with_rounded_weights_alike_alone_and_padded_and_the_folder_is_saved_as_it_came(folder):
    model, _ = load(folder)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with attach(model, Injection.model_validate({"mode": "w4a16", "kv_cache": "mxfp4"})) as harmed, torch.no_grad():
        padded = model(**forward_inputs(model, IDS, mask)).logits
        alone = model(**forward_inputs(model, IDS[:1, 4:], mask[:1, 4:])).logits
        harmed.require_calls()
    assert torch.allclose(padded[0, 4:], alone[0], atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(**forward_inputs(model, IDS, mask)).logits, padded, atol=1e-2)
    model.save_pretrained(folder / "saved")
    again = AutoModelForImageTextToText.from_pretrained(folder / "saved")
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert type(again) is type(model)
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())
