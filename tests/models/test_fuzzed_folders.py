"""Whatever became of a model folder's files, it loads or is refused in one line, and nothing in it changes."""

import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.models.load import load, skeleton
from fp4rl.models.quiet import quiet
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError, UserError
from fp4rl.spec.model import Embedded
from planted.damage import FEW, damage, hashes

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
SMALL = Embedded(hidden_size=32, num_layers=1, num_heads=1, intermediate_size=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = build_tokenizer()
    build(SMALL, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outcome(read, folder) -> str:
    """What it said, or nothing where the folder was read."""
    said = ""
    try:
        read(folder)
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or str(folder) in said or "adapter" in said
    return said


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they make of it
def test_a_damaged_model_folder(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "model"

    @FEW
    @given(st.data())
    def read(data):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        file = folder / data.draw(st.sampled_from(FILES))
        file.write_bytes(data.draw(damage(file.read_bytes())))
        left = hashes(folder)
        for how in (skeleton, load):
            outcome(how, folder)
        assert hashes(folder) == left

    read()


class _Runs:
    """What a pickle can do that only weights should not."""

    def __reduce__(self):
        return (print, ("it ran",))


@pytest.mark.parametrize("content", ["damaged", "program"])
def test_weights_in_a_pickle_that_cannot_be_read_or_would_run_are_one_line(saved, tmp_path, content, capsys):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if content == "damaged":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04garbage")
    else:
        torch.save(
            {"model.norm.weight": _Runs()}, folder / "pytorch_model.bin", pickle_protocol=pickle.HIGHEST_PROTOCOL
        )
    said = outcome(load, folder)
    assert "the model in" in said
    assert "save them as safetensors" in said
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "."}']
)
def test_an_adapter_whose_own_file_is_damaged_is_one_line(saved, tmp_path, monkeypatch, content):
    folder = shutil.copytree(saved, tmp_path / "adapter")
    monkeypatch.chdir(folder)
    (folder / "adapter_config.json").write_text(content)
    for read in (skeleton, load):
        assert "adapter_config.json" in outcome(read, folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 2000])
def test_a_damaged_index_of_shards_is_one_line(saved, tmp_path, content):
    from fp4rl.models.shards import stored_tensors

    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "the safetensors in" in outcome(stored_tensors, folder)


def test_a_mistake_of_ours_passes_as_it_is(tmp_path):
    from fp4rl.models.fit import readable

    with pytest.raises(InvalidValueError, match="as it is"), readable("x", tmp_path):
        raise InvalidValueError("as it is")
    with pytest.raises(KeyboardInterrupt), readable("x", tmp_path):
        raise KeyboardInterrupt
