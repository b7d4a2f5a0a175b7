"""A model's modules without its weights: what cannot be built is one line."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import DbrxConfig, Qwen2Config, Qwen2ForCausalLM

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load, skeleton
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection


def test_a_class_that_fails_on_its_own_configuration_is_refused_without_a_traceback(tmp_path):
    """The kind: what a model class raises while it is built. DBRX of transformers 5.23 asks for a setting that its
    own configuration lacks, an AttributeError."""
    tokenizer = build_tokenizer()
    DbrxConfig(d_model=64, n_heads=4, n_layers=1, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InvalidValueError, match="cannot be read: 'DbrxAttentionConfig' object has no attribute 'rope_theta'"
    ):
        skeleton(tmp_path)


EVERYWHERE = {"weight": ["rollout", "training", "evaluation", "reference"]}


@pytest.mark.parametrize(
    "injection",
    [
        {"mode": "w4a16"},
        {"mode": "w4a16", "lora": "merged"},
        {"mode": "w4a16", "frozen_base": "packed", "apply_during": EVERYWHERE},
    ],
    ids=["beside", "merged", "packed"],
)
def test_the_modules_of_an_adapter_s_folder_resolve_as_the_loaded_model(injection, tmp_path):
    """Fault: 'no adapted layer is taken' of a folder that holds an adapter, since its base alone was built."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=1, vocab_size=len(tokenizer), **sizes, **ends))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    described = Injection.model_validate(injection)
    built, loaded = skeleton(tmp_path / "adapter"), load(tmp_path / "adapter")[0]
    assert all(parameter.is_meta for parameter in built.parameters())
    assert resolve(built, described).as_dict() == resolve(loaded, described).as_dict()
