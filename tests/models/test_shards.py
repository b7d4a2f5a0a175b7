"""Tensors of safetensors files, read a few rows at a time: the stored bits, shards, and files that are damaged."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp4rl.models.shards import all_tensors, stored_tensors
from fp4rl.spec.errors import InvalidValueError, NotFoundError


def test_shards_give_back_the_stored_bits_whole_and_in_rows(tmp_path):
    tensors = {f"t{i}": torch.randn(7, 5).to(kind) for i, kind in enumerate((torch.float32, torch.bfloat16))}
    save_file({"t0": tensors["t0"]}, tmp_path / "a.safetensors")
    save_file({"t1": tensors["t1"], "ids": torch.arange(3)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"t0": "a.safetensors", "t1": "b.safetensors", "ids": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = stored_tensors(tmp_path)
    assert set(found) == {"t0", "t1"}
    for name, stored in found.items():
        assert torch.equal(stored.read(), tensors[name])
        pieces = list(stored.rows(3))
        assert [len(piece) for piece in pieces] == [3, 3, 1]
        assert torch.equal(torch.cat(pieces), tensors[name])


def test_a_missing_shard_and_a_folder_without_weights_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="no safetensors file"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"t": "gone.safetensors"}}')
    with pytest.raises(NotFoundError, match=r"gone\.safetensors"):
        stored_tensors(tmp_path)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    with pytest.raises(InvalidValueError, match="not a safetensors file"):
        stored_tensors(tmp_path)


def test_a_truncated_file_is_named(tmp_path):
    save_file({"t": torch.zeros(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(InvalidValueError, match="ends inside 't'"):
        stored_tensors(tmp_path)["t"].read()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool])
def test_what_packed_checkpoints_hold_is_read_too(tmp_path, kind):
    tensor = torch.arange(15).reshape(3, 5).to(kind)
    save_file({"t": tensor, "w": torch.ones(2)}, tmp_path / "quant_model_weights-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys("tw", "quant_model_weights-00001-of-00001.safetensors")}
    (tmp_path / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    found = all_tensors(tmp_path)
    assert found["t"].dtype == kind
    assert found["t"].read().view(torch.uint8).equal(tensor.view(torch.uint8))
    assert list(stored_tensors(tmp_path)) == ["w"]


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    header = json.dumps({"t": {"dtype": "F4", "shape": [2, 32], "data_offsets": [0, 32]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
    with pytest.raises(InvalidValueError, match="'t' is of a dtype"):
        all_tensors(tmp_path)
    assert not stored_tensors(tmp_path)
