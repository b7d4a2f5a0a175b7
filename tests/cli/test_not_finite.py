"""A NaN in one attention head, from the command line: eval, scan and run fail in one line, and a report says why."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fp4rl.cli.main import main
from fp4rl.lab.matrix import planned
from fp4rl.lab.runner import keep_suite
from fp4rl.lab.work import execute_run
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.load import load_spec

WEIGHT = "model.layers.1.self_attn.v_proj.weight"
LOGITS = "logits hold NaN or infinity; first out of model.layers.1.self_attn.v_proj, whose weight holds it"


@pytest.fixture
def broken(embedded_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(embedded_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT][: len(tensors[WEIGHT]) // 2, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "-p", "full", "-p", "w4a16", "--count", "4"], f"evaluation as full: {LOGITS}"),
        (["eval", "-p", "w4a4", "--samples", "2", "--count", "2"], f"evaluation as w4a4: {LOGITS}"),
        (["scan", "texts=4", "parts=sensitivity"], LOGITS),
        (["scan", "texts=4", "measured=false", "parts=[depth,dynamics]"], LOGITS),
        (["scan"], "model.layers.1.self_attn.v_proj: holds NaN or infinity"),
        (["scan", "weights_only=true"], "model.layers.1.self_attn.v_proj: holds NaN or infinity"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_nan_in_one_head_is_one_line_and_exit_code_1(words, said, broken, capsys):
    verb, *rest = words
    assert main([verb, str(broken), *rest]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"fp4rl: {said}")


def test_a_failed_run_is_reported_shown_and_compared_as_failed(broken, embedded_model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arm = {"training": {"steps": 1, "train_batch_size": 2, "rollout_n": 2, "mini_batch_size": 2}}
    base = arm | {"evaluation": {"count": 2, "max_new_tokens": 4, "profiles": ["full"]}, "task": {"name": "arithmetic"}}
    base["training"] |= {"filter_groups": {"enable": False}, "entropy_coeff": 0.1, "max_response_length": 8}
    arms = {"broken": {"model": {"path": str(broken)}}, "sound": {"model": {"path": str(embedded_model)}}}
    asked = {"question": "q", "treatment": "broken@full", "control": "sound@full", "factors": ["model"]}
    suite = {"suite": "nan", "seeds": [0], "base": base, "arms": arms, "comparisons": [asked]}
    (tmp_path / "nan.yaml").write_text(yaml.safe_dump(suite))
    keep_suite(tmp_path / "runs", "nan", suite)
    failing, sound = planned(load_spec(tmp_path / "nan.yaml"))
    execute_run(sound, tmp_path / "runs")
    with pytest.raises(CheckFailed):
        execute_run(failing, tmp_path / "runs")
    why = f"after step 0: evaluation as full: {LOGITS}"
    capsys.readouterr()

    assert main(["report", "nan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    states = {run["arm"]: (run["state"], run["gaps"]) for run in told["runs"]}
    assert states == {"broken": ("failed", [why]), "sound": ("finished", [])}
    assert any("failed: broken seed 0" in note for note in told["notes"])
    page = (tmp_path / "runs" / "nan" / "report.html").read_text()
    assert "<td>failed</td>" in page
    assert LOGITS in page
    assert main(["show", failing.run_id]) == 1
    assert capsys.readouterr().err == f"fp4rl: nan/{failing.run_id} failed: {why}\n"
    assert main(["compare", "nan"]) == 1
    assert "(failed: after step 0:" in " ".join(capsys.readouterr().out.split())
