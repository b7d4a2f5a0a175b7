"""Multimodal folders: their text model is trained, rounded and scored on text; what sees stays as it is and is kept."""

import pytest
import torch
from tiny_models import MULTIMODAL, multimodal
from transformers import AutoModelForImageTextToText

from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load, skeleton
from fp4rl.models.positions import forward_inputs
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.targets import noisy_weights
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise

IDS = torch.arange(10, 34).view(2, 12)
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(params=MULTIMODAL)
def folder(request, tmp_path):
    multimodal(request.param).save_pretrained(tmp_path)
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
