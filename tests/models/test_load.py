"""A model folder loads as it was saved, or one line says what it lacks."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import experts_in, multimodal

from fp4rl.models.load import load, skeleton
from fp4rl.models.save import save
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError, NotFoundError, UserError
from fp4rl.spec.model import Embedded, Model

PROMPT = "Q: Tom has 2 3 coins . loses 2 . How many ? A:"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = build_tokenizer()
    build(Embedded(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refused(folder, kind, message) -> None:
    with pytest.raises(kind, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def logits(model, tokenizer):
    with torch.no_grad():
        return model(tokenizer(PROMPT, return_tensors="pt")["input_ids"]).logits


def test_what_was_saved_is_loaded_to_the_bit_and_in_evaluation_mode(saved):
    model, tokenizer = load(saved)
    assert not model.training
    assert torch.equal(logits(model, tokenizer), logits(build(Embedded(), tokenizer), tokenizer))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_a_word_or_a_torch_dtype(saved, dtype):
    assert {weight.dtype for weight in load(saved, dtype)[0].parameters()} == {torch.bfloat16}


def test_an_unknown_dtype_names_the_nearest(saved):
    with pytest.raises(InvalidValueError, match="no dtype 'bfloat61' for a model; did you mean 'bfloat16'"):
        load(saved, "bfloat61")


def test_a_folder_that_does_not_exist(tmp_path):
    refused(tmp_path / "gone", NotFoundError, r"gone' does not exist; give a Hugging Face folder on this disk")


def test_a_name_from_a_registry_is_not_looked_up():
    refused("some-lab/some-model-1b", NotFoundError, "does not exist; give a Hugging Face folder")


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    refused(folder, NotFoundError, "has no config.json; is it a Hugging Face model folder")


def test_parts_that_ranks_of_verl_saved_are_told_with_the_command_that_joins_them(folder, tmp_path):
    actor = tmp_path / "actor"
    actor.mkdir()
    for rank in range(2):
        (actor / f"model_world_size_2_rank_{rank}.pt").touch()
    (actor / "fsdp_config.json").write_text("{}")
    command = rf"`python -m verl\.model_merger merge --backend fsdp --local_dir {actor} --target_dir MERGED` joins them"
    refused(actor, NotFoundError, command)
    shutil.copytree(folder, actor / "huggingface")  # configuration and tokenizer alone, as verl leaves it by default
    (actor / "huggingface" / "model.safetensors").unlink()
    refused(actor / "huggingface", InvalidValueError, command)


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_folder_without_a_tokenizer(folder, left):
    for file in folder.glob("tokenizer*"):
        if file.name not in left:
            file.unlink()
    refused(folder, NotFoundError, r"has no tokenizer; save one there \(save_pretrained\)")


def test_a_folder_without_a_tokenizer_is_refused_before_the_weights_are_read(folder):
    for file in (*folder.glob("tokenizer*"), folder / "model.safetensors"):
        file.unlink()
    refused(folder, NotFoundError, "has no tokenizer")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, UserError, "cannot be read")


def test_a_weights_file_that_is_cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, InvalidValueError, "cannot be read")


def test_a_tokenizer_that_is_no_json(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, InvalidValueError, "tokenizer in .* cannot be read")


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    refused(folder, InvalidValueError, "cannot be read")


def test_a_missing_weight_is_refused_instead_of_being_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, NotFoundError, r"lacks 1 weights \('model.layers.1.mlp.up_proj.weight'\)")


def test_a_weight_of_another_shape_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, InvalidValueError, "cannot be read")


def without(folder, *tokens: str) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k not in tokens}))


def test_without_a_padding_token_the_end_token_pads(folder):
    without(folder, "pad_token")
    tokenizer = load(folder)[1]
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"
    assert tokenizer([PROMPT, "Q:"], padding=True)["input_ids"][1][0] == tokenizer.eos_token_id


def test_without_a_padding_and_an_end_token_there_is_nothing_to_pad_with(folder):
    without(folder, "pad_token", "eos_token")
    refused(folder, InvalidValueError, "has no pad and no eos token; set one and save again")


@pytest.fixture
def adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = load(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_folder_loads_its_base_and_really_acts(adapter, folder):
    model, tokenizer = load(adapter)
    base, _ = load(folder)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert not torch.allclose(logits(model, tokenizer), logits(base, tokenizer))


def test_an_adapter_whose_base_is_not_here(adapter, folder):
    shutil.rmtree(folder)
    refused(adapter, NotFoundError, r"base model '.*' is no folder here; set base_model_name_or_path to one")


def test_an_adapter_that_lacks_weights_is_refused_instead_of_acting_as_the_base(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w for name, w in weights.items() if "q_proj" not in name}, adapter / "adapter_model.safetensors")
    refused(adapter, NotFoundError, r"adapter in .* lacks 4 weights")


def test_an_adapter_without_its_weights_file(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, InvalidValueError, "adapter in .* cannot be read")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Qwen3-MoE in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("mixture"), build_tokenizer()
    torch.manual_seed(0)
    model = experts_in("qwen3_moe", device="cpu", vocab=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_way_in_which_experts_are_computed_is_chosen_here_and_kept_with_a_saved_folder(mixture, tmp_path):
    """grouped_mm by itself; a kernel that a folder asks for and that nothing can round in is not taken."""
    model, tokenizer = load(mixture)
    assert model.config._experts_implementation == "grouped_mm"
    kinds = {way: load(mixture, experts=way)[0] for way in ("eager", "batched_mm")}
    assert {way: m.config._experts_implementation for way, m in kinds.items()} == {way: way for way in kinds}
    for way, one in kinds.items():
        save(one, tokenizer, tmp_path / way, mixture, way)
        assert load(tmp_path / way)[0].config._experts_implementation == way
        assert skeleton(tmp_path / way).config._experts_implementation == way
        assert load(tmp_path / way, experts="grouped_mm")[0].config._experts_implementation == "grouped_mm"
    config = json.loads((tmp_path / "eager" / "config.json").read_text())
    (tmp_path / "eager" / "config.json").write_text(json.dumps(config | {"experts_implementation": "sonicmoe"}))
    assert load(tmp_path / "eager")[0].config._experts_implementation == "grouped_mm"


def test_a_choice_where_there_is_none_is_refused(folder):
    for opened in (load, skeleton):
        with pytest.raises(InvalidValueError, match=r"experts_implementation: Qwen2ForCausalLM .* leave it out"):
            opened(folder, experts="eager")
    with pytest.raises(ValueError, match="the embedded model has no experts"):
        Model(experts_implementation="eager")
    with pytest.raises(ValueError, match="'eager', 'grouped_mm' or 'batched_mm'"):
        Model(path=str(folder), experts_implementation="sonicmoe")


def test_the_part_below_a_head_is_found_where_a_class_names_another(tmp_path):
    """Fault: Llama-4's language model says that it stands under `language_model`, so TRL took all of it for the part
    below its head: 'MoeCausalLMOutputWithPast' object has no attribute 'last_hidden_state'."""
    tokenizer = build_tokenizer()
    experts_in("llama4_text", device="cpu", vocab=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert model.base_model is model.model
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_part_below_a_head_may_stand_deeper_and_no_weight_gets_a_second_name(tmp_path):
    """Fault: a run on a Llama-4 folder with its towers took the vision model for the part below the head."""
    tokenizer = build_tokenizer()
    multimodal("Llama4").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    model, _ = load(tmp_path)
    assert model.base_model is model.language_model.model
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names
    twin = copy.deepcopy(model)
    assert twin.base_model is twin.language_model.model
