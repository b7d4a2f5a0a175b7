"""A fresh adapter sits on the layers that it names, of the text model alone."""

import pytest
import torch
from tiny_models import MULTIMODAL, experts_in, multimodal
from torch import nn

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load, skeleton
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.check import check
from fp4rl.rl.lora import with_lora
from fp4rl.rl.run import Run
from fp4rl.rl.session import ResumeState, TrainingSession
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded, Lora


def test_an_adapter_sits_where_it_is_told_to_and_a_layer_that_is_not_there_is_a_mistake(tmp_path):
    def adapted(*names):
        model = with_lora(
            build(Embedded(num_layers=1), build_tokenizer()), Lora(rank=2, target_modules=names), tmp_path
        )
        return {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}

    assert adapted("q_proj", "v_proj") == {"q_proj", "v_proj"}
    assert adapted("all-linear") == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(InvalidValueError, match="no layer 'q_prj'; did you mean 'q_proj'"):
        adapted("q_prj")
    with pytest.raises(ValueError, match="all-linear alone"):
        Lora(target_modules=("all-linear", "q_proj"))


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
def test_an_adapter_sits_on_stacked_experts_that_are_named_and_never_on_a_router_that_returns_a_choice(tmp_path):
    """Fault: Llama-4's router returns two tensors; an adapter that peft's all-linear put on it took them for one."""

    def adapted(family, **lora):
        model = with_lora(experts_in(family), Lora(rank=2, **lora), tmp_path)
        return {name.split(".mlp.")[-1].split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}

    both = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert adapted("qwen3_moe", target_modules=(), target_parameters=both) == {"experts", "experts.base_layer"}
    assert not any("router" in name for name in adapted("llama4_text"))
    with pytest.raises(
        InvalidValueError, match=r"no parameter 'experts.down_prj'.*did you mean 'mlp.experts.down_proj'"
    ):
        adapted("qwen3_moe", target_parameters=("experts.down_prj",))
    with pytest.raises(InvalidValueError, match=r"target_parameters: \[experts.gate_up_proj, experts.down_proj\]"):
        adapted("qwen3_moe", target_modules=("experts",))
    with pytest.raises(InvalidValueError, match="peft refuses it: No modules were targeted"):
        adapted("llama4_text", target_modules=("router",))
    with pytest.raises(InvalidValueError, match=r"peft refuses it: .* \(stacked experts take no dropout: set 0\)"):
        adapted("qwen3_moe", dropout=0.1)
    with pytest.raises(ValueError, match="takes no dropout; set 0"):
        Lora(target_parameters=both, dropout=0.1)
    with pytest.raises(ValueError, match="both empty"):
        Lora(target_modules=())


@pytest.mark.parametrize("family", MULTIMODAL)
def test_an_adapter_sits_on_the_text_model_of_a_multimodal_one_even_where_names_are_alike(family, tmp_path):
    """Fault: peft's all-linear took every layer of the vision tower too: adapters that no text passes through."""

    def adapted(*names):
        model = with_lora(multimodal(family), Lora(rank=2, target_modules=names), tmp_path)
        return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}

    layers = [f"base_model.model.model.language_model.layers.{layer}." for layer in range(3)]
    attention, mlp = [f"self_attn.{n}_proj" for n in "qkvo"], [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert adapted("all-linear") == {layer + name for layer in layers for name in attention + mlp}
    assert adapted("q_proj", "down_proj") == {layer + name for layer in layers for name in (attention[0], mlp[2])}
    seeing = {"Gemma3": "fc1", "Qwen2_5_VL": "qkv", "Qwen3VL": "linear_fc1"}[family]
    with pytest.raises(InvalidValueError, match=f"no layer '{seeing}' that text passes through"):
        adapted(seeing)


EXPERTS = Lora(rank=2, target_modules=("q_proj",), target_parameters=("experts.gate_up_proj", "experts.down_proj"))
FOLDERS = {
    "Qwen2": (lambda tokenizer: build(Embedded(), tokenizer), Lora(rank=2)),
    "Qwen3-MoE": (lambda tokenizer: experts_in("qwen3_moe", "cpu", len(tokenizer)), EXPERTS),
    "Llama-4 with towers": (lambda _: multimodal("Llama4"), EXPERTS),
}


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
@pytest.mark.parametrize("kind", FOLDERS)
def test_the_skeleton_of_an_adapters_folder_has_the_sites_of_what_is_loaded(kind, tmp_path):
    """Fault: its skeleton was its base's, so that training an adapter on under `lora: merged` was refused."""
    make, lora = FOLDERS[kind]
    tokenizer = build_tokenizer()
    make(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_lora(load(tmp_path / "base")[0], lora, tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    injection = Injection.model_validate({"mode": "w4a4", "lora": "merged"})
    found, known = resolve(skeleton(tmp_path / "adapter"), injection), resolve(load(tmp_path / "adapter")[0], injection)
    assert found.as_dict() == known.as_dict()
    assert {plan.name for plan in found.plans if plan.merged}
    spec = {"model": {"path": str(tmp_path / "adapter")}, "injection": {"mode": "w4a4", "lora": "merged"}}
    check(Experiment.model_validate(spec | {"training": {"max_prompt_length": 128, "max_response_length": 8}}))


def test_an_adapter_that_is_trained_on_is_its_own_reference_at_the_start(tmp_path):
    """Fault: TRL put its fused head around the adapter, 'has no attribute last_hidden_state': no KL, no such run."""
    tokenizer = build_tokenizer()
    build(Embedded(), tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_lora(load(tmp_path / "base")[0], Lora(rank=2), tmp_path / "base")
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "adapter"
    adapted.save_pretrained(path)
    training = {"algorithm": "grpo", "train_batch_size": 2, "mini_batch_size": 2, "rollout_n": 2, "steps": 1}
    training |= {"filter_groups": {"enable": False}, "distillation": {"coef": 1.0}, "max_response_length": 8}
    described = Experiment.model_validate({"model": {"path": str(path)}, "training": training})
    trainer = TrainingSession(Run(described, tmp_path, path, lambda _: None), ResumeState()).trainer
    batch = trainer._generate_and_score_completions([{"prompt": ""}] * 4)
    own, answered = batch["sampling_per_token_logps"], batch["completion_mask"].bool()
    assert torch.allclose(batch["ref_per_token_logps"][answered], own[answered], atol=1e-4)
    with trainer.model.disable_adapter():
        assert not torch.allclose(trainer._old(batch)[answered], own[answered], atol=1e-2)
