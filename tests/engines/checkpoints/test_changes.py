"""What is exported may be changed by words of the command: keys of the injection, and fragments of `fp4rl scan`."""

import json

import pytest
import torch
from export_models import folder_of
from safetensors.torch import load_file

from fp4rl.cli.main import main


@pytest.fixture
def folder(tmp_path):
    return folder_of("qwen2", tmp_path / "model", torch.bfloat16, intermediate_size=192)


def types(out):
    return json.loads((out / "quant_model_description.json").read_text())


def test_layers_are_left_and_mixed_by_keys_of_the_injection(folder, tmp_path):
    words = ["injection.targets.leave=['*o_proj']", "injection.by_pattern={'*down_proj': mxfp8}"]
    out = tmp_path / "out"
    assert main(["export", str(folder), str(out), *words, "--to", "ascend_v1"]) == 0
    said = {name.rsplit(".", 2)[-2]: kind for name, kind in types(out).items() if name.endswith("_proj.weight")}
    assert said == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "W4A8_MXFP"),
        "o_proj": "FLOAT",
        "down_proj": "W8A8_MXFP8",
    }
    assert main(["verify", str(out)]) == 0


def test_another_format_at_a_point_takes_the_place_of_the_usual_mode(folder, tmp_path):
    words = ["injection.weight=mxfp8", "injection.deployment=vllm_ascend_ceil_x"]
    assert main(["export", str(folder), str(tmp_path / "out"), *words, "--to", "ascend_v1"]) == 0
    assert types(tmp_path / "out")["model_quant_type"] == "W8A8_MXFP8"
    assert "Packer msmodelslim_ceil_x" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("layout", ["modelopt", "compressed_tensors"])
def test_static_factors_that_a_scan_has_found_are_exported(layout, folder, tmp_path):
    factors, out, text = tmp_path / "factors.yaml", tmp_path / "out", tmp_path / "text.txt"
    text.write_text("What is 7 + 5? The answer is 12.\nWhat is 9 - 3? The answer is 6.\n")
    words = ["injection=nvfp4_w4a4", f"text={text}", "parts=precision", "--calibrate", str(factors)]
    assert main(["scan", str(folder), *words]) == 0
    assert main(["export", str(folder), str(out), f"+{factors}", "--to", layout]) == 0
    stored = {key for key in load_file(out / "model.safetensors") if ".input_" in key and key.endswith("scale")}
    assert len(stored) == 14
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["+{file}", "--mode", "w4a4"], "--mode w4a4, but +"),
        (
            ["injection.deployment=vllm_ascend", "--deployment", "compressed_tensors"],
            "--deployment compressed_tensors, but",
        ),
        (["training.lr=1"], "an export takes keys of `injection`"),
        (["injection=w4a8"], "an export takes keys of `injection`"),
        (["injection.weight=mxfp5"], "no number format is called 'mxfp5'"),
        (["injection.targets.leave=['*qproj']"], "qproj"),
        (["+nowhere.yaml"], "no such file"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named(words, why, folder, tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("injection: {mode: w8a8}\n")
    given = [word.format(file=file) if word.startswith("+") else word for word in words]
    assert main(["export", str(folder), str(tmp_path / "out"), *given, "--to", "ascend_v1"]) == 2
    assert why in capsys.readouterr().err
