"""The weight stream is what the live model multiplies by, under the names of its checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.perturb import perturb
from fp4rl.rl.lora import with_lora
from fp4rl.rl.stream import injected_states, weight_stream
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded, Lora
from fp4rl.spec.noise import Noise

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SIZES |= {"intermediate_size": 96, "vocab_size": 60, "initializer_range": 0.2, "num_local_experts": 4, "num_experts": 4}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False}
FAMILIES = ("qwen2", "qwen3_moe", "mixtral", "gpt_oss", "gpt2")


def of(family):
    torch.manual_seed(0)
    sizes = {**SIZES, "n_embd": 64, "n_head": 4, "n_layer": 2} if family == "gpt2" else SIZES
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


def loaded(config, weights, folder):
    """A model without injection from a folder with the stream's tensors, as transformers reads any checkpoint."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", None])
def test_a_plain_model_with_the_streams_weights_gives_the_same_logits(family, weight, tmp_path):
    model = of(family)
    fmt = {"name": "nvfp4", "factor": "fused"} if weight == "nvfp4" else weight
    with attach(model, Injection.model_validate({"weight": fmt})) as attachment:
        attachment.set_phase("rollout")
        stream = {name: tensor.clone() for name, tensor in weight_stream(model)}
        live = logits(model)
    assert torch.equal(logits(loaded(model.config, stream, tmp_path / "stream")), live)
    assert torch.equal(live, logits(model)) == (weight is None)
    model.save_pretrained(tmp_path)
    assert set(stream) == set(load_file(tmp_path / "model.safetensors"))


def test_phases_noise_and_new_weights_are_in_it():
    model = of("qwen2")
    name = "model.layers.0.mlp.up_proj.weight"
    norm = "model.layers.0.input_layernorm.weight"
    master = dict(model.named_parameters())[name].detach().clone()
    with attach(model, Injection.named("w4a4")) as attachment:
        attachment.set_phase("reference")
        assert torch.equal(dict(weight_stream(model))[name], master)
        attachment.set_phase("rollout")
        rounded = dict(weight_stream(model))[name].clone()
        assert not torch.equal(rounded, master)
        with perturb(model, Noise(), 0.1, generator=torch.Generator().manual_seed(0)):
            noisy = dict(weight_stream(model))
            assert torch.equal(noisy[norm], model.model.layers[0].input_layernorm.weight)
            assert (noisy[norm] - 1).std() > 0.05
        assert torch.equal(dict(weight_stream(model))[norm], torch.ones(64))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert torch.equal(dict(weight_stream(model))[name], 2 * rounded)
        assert len(injected_states(model)) == len(attachment.states) == 14
    assert injected_states(model) == []


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_adapters_are_in_the_matrices(lora, tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build(Embedded(), tokenizer)
    model.save_pretrained(tmp_path)
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), tmp_path).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    with attach(adapted, Injection.model_validate({"weight": "mxfp4", "lora": lora})) as attachment:
        attachment.set_phase("rollout")
        stream = {name: tensor.clone() for name, tensor in weight_stream(adapted)}
        live = logits(adapted)
    plain = loaded(model.config, stream, tmp_path / "stream")
    assert set(stream) == set(load_file(tmp_path / "model.safetensors"))
    assert (logits(plain) - live).abs().max() < (1e-5 if lora == "adapter" else 1e-6)
    with attach(adapted, Injection.named("w4a4")) as attachment:
        attachment.set_phase("rollout")
        with pytest.raises(InvalidValueError, match=r"Q\(W\) Q\(x\) \+ BA x is no product with one matrix"):
            list(weight_stream(adapted))


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_adapters_of_stacked_experts_are_in_the_matrices(lora, tmp_path):
    model = of("qwen3_moe")
    model.save_pretrained(tmp_path)
    experts = ("experts.gate_up_proj", "experts.down_proj")
    chosen = Lora(rank=4, alpha=8.0, dropout=0.0, target_modules=("q_proj",), target_parameters=experts)
    adapted = with_lora(model, chosen, tmp_path).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    with attach(adapted, Injection.model_validate({"weight": "mxfp4", "lora": lora})) as attachment:
        attachment.set_phase("rollout")
        stream = {name: tensor.clone() for name, tensor in weight_stream(adapted)}
        live = logits(adapted)
    plain = loaded(model.config, stream, tmp_path / "stream")
    assert set(stream) == set(load_file(tmp_path / "model.safetensors"))
    assert (logits(plain) - live).abs().max() < 1e-5
    with attach(adapted, Injection.model_validate({"weight": "mxfp4", "input": "mxfp4", "lora": lora})) as attachment:
        attachment.set_phase("rollout")
        if lora == "merged":
            assert len(list(weight_stream(adapted))) == len(stream)
        else:
            with pytest.raises(InvalidValueError, match=r"Q\(W\) Q\(x\) \+ BA x is no product with one matrix"):
                list(weight_stream(adapted))


def test_a_stack_of_unknown_layout_is_no_stream():
    """Kind: rounding along an axis that nothing has confirmed."""
    model = of("qwen3_moe")
    with attach(model, Injection.named("w4a16")) as attachment:
        attachment.set_phase("rollout")
        stacks = [state for state in injected_states(model) if state.plan.site.kind == "experts"]
        assert len(stacks) == 4
        stacks[1].transposed = None
        with pytest.raises(InvalidValueError, match="nothing tells how this square stack is stored"):
            list(weight_stream(model))


def test_a_packed_base_comes_unpacked():
    model = of("qwen2")
    model.requires_grad_(False)
    with attach(model, Injection.model_validate({"weight": "mxfp4"})) as attachment:
        attachment.set_phase("rollout")
        wanted = {name: tensor.clone() for name, tensor in weight_stream(model)}
    packed = {"weight": "mxfp4", "frozen_base": "packed"}
    packed["apply_during"] = {"weight": ["rollout", "training", "reference", "evaluation"]}
    with attach(model, Injection.model_validate(packed)) as attachment:
        attachment.set_phase("rollout")
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in weight_stream(model))
