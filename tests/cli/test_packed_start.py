"""Packed folders on the command line: they are scanned, evaluated and trained, and what that means is said."""

import json
import shutil

import pytest
import torch
import yaml
from packed_models import LINEAR, by_compressed_tensors, by_msmodelslim, edit_config, edit_tensors, weights_file

from fp4rl.cli.main import main
from fp4rl.cli.terminal import _renamed
from fp4rl.models.load import load
from fp4rl.models.packed.folder import PackedFolder

NOTE = "is packed (AscendV1 W4A4_MXFP4_DUALSCALE): 13,312 of 22,656 values were decoded and lie on its grid"
SERVED = "served with mxfp4 and mxfp4_dual and mxfp8 inputs, which `full` leaves as they are"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return by_msmodelslim(tmp_path_factory.mktemp("packed") / "m")


@pytest.fixture
def fp4rl(capsys):
    """Runs a command; returns exit code, stdout, and stderr on one line."""

    def run(*words):
        _renamed.clear()  # what is said once a command
        capsys.readouterr()
        code, said = main([str(word) for word in words]), capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return run


def test_a_packed_folder_is_scanned_from_its_files_and_as_a_model(packed, fp4rl):
    code, out, said = fp4rl("scan", packed, "weights_only=true", "injection=w4a4", "deployment=vllm_ascend", "--json")
    assert code == 0, said
    assert NOTE in said
    assert SERVED in said
    errors = {part["site"].rsplit(".")[-1]: part["measures"]["relative_l2"] for part in json.loads(out)["parts"]}
    assert [errors[name] for name in ("o_proj", "gate_proj", "up_proj")] == [0.0] * 3  # on that grid already
    assert all(errors[name] > 0 for name in ("q_proj", "down_proj"))  # MXFP8, and under dual scales
    code, again, _ = fp4rl("scan", packed, "injection=w4a4", "deployment=vllm_ascend", "texts=2", "--json")
    assert code == 0
    weights = {p["site"].rsplit(".")[-1]: p for p in json.loads(again)["parts"] if p["part"] == "weight"}
    assert {name: part["measures"]["relative_l2"] for name, part in weights.items()} == pytest.approx(errors)


def test_sites_of_a_packed_folder_are_those_of_the_model(packed, fp4rl):
    code, out, said = fp4rl("sites", packed, "--mode", "w4a8", "--json")
    assert (code, len(json.loads(out)["plans"])) == (0, 7)
    assert NOTE in said


def test_it_is_evaluated_unrounded_and_as_it_is_served(packed, fp4rl):
    words = ("eval", packed, "-p", "full", "-p", "stored", "-p", "w4a4", "--count", "4", "--max-new-tokens", "8")
    code, out, said = fp4rl(*words)
    assert code == 0, said
    assert said.count("is packed") == 1
    assert "stored: inputs mxfp8 and mxfp4 and mxfp4_dual, weights as AscendV1" in said
    assert "w4a4: rounds the stored weights once more; -p stored takes them as they are" in " ".join(out.split())
    assert "w16a4" not in out
    profiles = {p["profile"]["name"]: p for p in json.loads(fp4rl(*words, "--json")[1])}
    assert profiles["stored"]["profile"]["sites_digest"] not in (None, profiles["w4a4"]["profile"]["sites_digest"])


@pytest.mark.filterwarnings("ignore")
def test_weights_alone_are_stored_as_full(tmp_path, fp4rl):
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    folder = by_compressed_tensors(tmp_path / "m", ("MXFP4A16", LINEAR))
    few = ("--count", "4", "--max-new-tokens", "4", "--json")
    code, out, said = fp4rl("eval", folder, "-p", "stored", "-p", "full", *few)
    assert (code, [p["profile"]["name"] for p in json.loads(out)]) == (0, ["full"])
    assert "stored: compressed-tensors mxfp4-pack-quantized leaves inputs as they are" in said


def test_a_run_starts_from_the_decoded_values(packed, tmp_path, fp4rl, in_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = {"steps": 1, "train_batch_size": 2, "mini_batch_size": 2, "rollout_n": 2, "lr": 0.01}
    training |= {"max_response_length": 8, "entropy_coeff": 0.1, "filter_groups": {"enable": False}}
    base = {"model": {"path": str(packed)}, "training": training, "injection": {"mode": "w4a4"}}
    base["evaluation"] = {"count": 2, "max_new_tokens": 4, "profiles": ["full", "deployment"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"suite": "s", "seeds": [0], "base": base, "arms": {"a": {}}}))
    code, out, said = fp4rl("run", "s.yaml")
    assert code == 0, said + out
    (run,) = (tmp_path / "runs" / "s").glob("a-s0-*")
    result = json.loads((run / "result.json").read_text())
    kept = json.dumps(result) + (run / "evidence.jsonl").read_text() + out + said
    assert "masters start from the decoded values" in " ".join(kept.split())
    final, opened = load(run / "final")[0], PackedFolder.open(packed)
    assert not hasattr(final.config, "quantization_config")
    assert not (run / "final" / "quant_model_description.json").exists()
    for name in opened.weights:  # one step away from them
        moved = (final.get_parameter(name) - opened.values(name, torch.float32)).abs()
        assert 0 < moved.max() < 0.05


def _cut(folder):
    whole = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(whole[:-40])


WRONG = {
    "cut short": (_cut, "the file ends inside"),
    "a scale is missing": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(f"{DOWN}.weight_scale")),
        f"{DOWN}.weight_scale is listed in quant_model_description.json, but no file holds it",
    ),
    "a transposed scale": (
        lambda folder: edit_tensors(
            folder, lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].T.contiguous()})
        ),
        f"{DOWN}.weight_scale is [3, 32], but {DOWN}.weight of [32, 96] values in groups of 32 needs [32, 3]",
    ),
    "another method": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        "is quantized already (quantization_config: gptq)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("verb", [("eval", "-p", "stored"), ("eval",), ("scan", "weights_only=true"), ("sites",)])
def test_a_wrong_folder_is_one_line(wrong, verb, packed, tmp_path, fp4rl):
    folder = shutil.copytree(packed, tmp_path / "m")
    change, message = WRONG[wrong]
    change(folder)
    code, out, said = fp4rl(verb[0], folder, *verb[1:])
    assert (code, out) == (2, "")
    assert message in said
    assert "Traceback" not in said


def test_stored_without_packed_weights_is_refused(embedded_model, fp4rl):
    code, _, said = fp4rl("eval", embedded_model, "-p", "stored")
    assert code == 2
    assert "its weights are not packed, so they are stored as no format; take full" in said
    code, _, said = fp4rl("eval", embedded_model, "-p", "stored={weight: mxfp4}")
    assert code == 2
    assert "means a packed folder as it is served; take another name" in said


def test_a_packed_folder_is_not_packed_again(packed, tmp_path, fp4rl):
    code, _, said = fp4rl("export", packed, tmp_path / "out", "--to", "bf16")
    assert code == 2
    assert "its weights are packed already (AscendV1 W4A4_MXFP4_DUALSCALE); export their source" in said
    assert not (tmp_path / "out").exists()
