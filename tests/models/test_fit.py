"""A folder that would be measured as something else than it is, or fail in the middle, is refused in one line."""

import json
import shutil

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from fp4rl.models.load import load, skeleton
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import BOS, EOS, build_tokenizer
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.model import Embedded


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "model"
    tokenizer = build_tokenizer()
    build(Embedded(num_layers=1), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refused(folder, message) -> None:
    for open_folder in (load, skeleton):
        with pytest.raises(InvalidValueError, match=message) as caught:
            open_folder(folder)
        assert "\n" not in str(caught.value)


def save_tokenizer(folder, single: str) -> None:
    """The embedded tokenizer with what it puts around a text."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("single", "message"),
    [
        (f"$A {EOS}", r"ends every text with '<eos>', .* add_eos_token=False"),
        (f"{BOS} $A {EOS}", r"ends every text with '<eos>'"),
        (f"{BOS} {BOS} $A", r"begins every text with '<bos>' twice"),
    ],
)
def test_a_tokenizer_that_closes_its_prompts_or_opens_them_twice_is_refused(folder, single, message):
    """The kind: what a tokenizer adds to a prompt by itself changes every answer (47.5 to 30.0 %) without a word."""
    save_tokenizer(folder, single)
    refused(folder, message)


def test_a_tokenizer_that_opens_a_text_once_is_used_as_it_is(folder):
    save_tokenizer(folder, f"{BOS} $A")
    tokenizer = load(folder)[1]
    assert tokenizer("Q:")["input_ids"] == [tokenizer.bos_token_id, *build_tokenizer()("Q:")["input_ids"]]


@pytest.mark.parametrize("role", ["pad_token", "eos_token"])
def test_a_special_token_outside_the_embedding_is_named_with_both_numbers(folder, role):
    """The kind: a token that was added to the tokenizer alone; its row of the embedding does not exist."""
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({role: AddedToken("<added>", special=True)})
    tokenizer.save_pretrained(folder)
    refused(folder, rf"{role} '<added>' .* is token {rows}, but the model's embedding ends at {rows - 1}: .*{rows + 1}")


def test_an_added_token_that_nothing_uses_by_itself_is_no_fault(folder):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<never>"])
    tokenizer.save_pretrained(folder)
    load(folder)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: awq"),
        ({"compression_config": {"format": "nvfp4-pack-quantized"}}, "compression_config: nvfp4-pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config: fp8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: of a kind that it does not name"),
    ],
)
def test_a_base_quantized_by_a_method_that_is_not_read_is_refused_by_its_name(folder, more, named):
    """The kind: a checkpoint whose weights hold a rounding already; its `full` would be another model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    refused(folder, rf"is quantized already \({named}\): .* give the unquantized folder")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_so_is_one_whose_tool_says_it_in_a_file_of_its_own(folder, name):
    (folder / name).write_text("{}")
    refused(folder, rf"is quantized already \({name}\)")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("hf_quant_config.json", "modelopt None is not read here"),
        ("quant_model_description.json", "quant_model_description.json does not list it"),
    ],
)
def test_a_file_that_says_nothing_of_the_quantization_it_stands_for_is_refused(folder, file, message):
    (folder / file).write_text("{}")
    refused(folder, message)


@pytest.mark.parametrize("method", ["mxfp4", "compressed-tensors"])
def test_a_method_without_a_packed_weight_is_refused(folder, method):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    refused(folder, f"{method} says that weights are packed, but its files hold no packed weight")


def test_a_config_that_quantizes_nothing_is_no_quantized_base(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    load(folder)


def test_an_adapter_on_a_quantized_base_is_refused_too(folder, tmp_path):
    (folder / "quantize_config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    refused(adapter, "is quantized already")
