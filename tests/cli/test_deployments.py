"""`fp4rl deployments`, and the line of `plan` that says what each arm would be served as."""

import json
import subprocess
import sys

import pytest

from fp4rl.cli.main import main
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.kernels import SERVED_MODES

SUITE = """
suite: served
seeds: [0]
base:
  evaluation: {count: 4, deployment: compressed_tensors, profiles: [full, w4a4]}
arms:
  bf16: {}
  w4a16: {injection: {mode: w4a16, deployment: vllm_blackwell}}
  w4a8: {injection: {mode: w4a8, deployment: vllm_ascend}}
  more: {injection: {mode: w4a8, deployment: vllm_ascend}, training: {lr: 1.0e-5}}
  nv: {injection: {mode: nvfp4_w4a16, deployment: ascend950}}
  own: {injection: {weight: mxfp4, input: mxfp6_e2m3}}
  hand: {injection: {weight: {name: mxfp4, rotation: 32}, input: mxfp4}}
  odd: {injection: {mode: w16a4, deployment: ocp}}
  dual: {injection: {mode: w4a8, deployment: vllm_ascend_dualscale}}
"""


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def words(text):
    return " ".join(text.split())


def test_the_list_holds_every_packer_and_kernel_with_its_source_on_80_columns(shown):
    code, out, _ = shown("deployments")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    for deployment in DEPLOYMENTS.values():
        assert f"{deployment.name} {deployment.packer.name} {deployment.kernel.name}" in words(out)
        for part in (deployment.packer, deployment.kernel):
            assert words(f"{part.checked}: {part.source}") in words(out)
        assert str(deployment.packer.weights) in words(out)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_one_deployment_says_what_serves_each_mode_and_where(shown, name):
    deployment = DEPLOYMENTS[name]
    code, out, _ = shown("deployments", name)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"hardware: {deployment.kernel.hardware}" in words(out)
    assert words(deployment.note) in words(out)
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip() and line.split()[0] in SERVED_MODES}
    assert list(rows) == list(SERVED_MODES)
    for mode, line in rows.items():
        served = deployment.served(mode)
        expected = "not looked up" if served is None else served.mode or "nothing"
        assert line.split(maxsplit=1)[1].startswith(expected), line
        assert words(served.note if served else "") in words(out)


def test_dispatch_that_changes_the_mode_is_told(shown):
    """As vLLM's sources have it: a W4A16 file on SM100 runs W4A4, a W4A4 file on Hopper runs W4A16; NVFP4 keeps A16."""
    found = {row["name"]: row["serves"] for row in json.loads(shown("deployments", "--json")[1])}
    assert found.keys() == DEPLOYMENTS.keys()
    assert found["vllm_blackwell"]["w4a16"] == {
        "mode": "w4a4",
        "note": "vLLM takes any MXFP4 group without FP8 inputs for W4A4",
        "changed": True,
    }
    assert found["vllm_hopper"]["w4a4"]["mode"] == "w4a16"
    assert found["vllm_blackwell"]["nvfp4_w4a16"] == {"mode": "nvfp4_w4a16", "note": "", "changed": False}
    assert "in_features % 64 == 0" in found["vllm_ascend"]["w4a8"]["note"]
    assert "routed experts alone" in found["vllm_ascend"]["w4a16"]["note"]
    assert found["vllm_ascend"]["nvfp4_w4a4"] == {"mode": None, "note": "Ascend has no NVFP4", "changed": True}
    assert "w4a8" not in found["vllm_hopper"]
    one = json.loads(shown("deployments", "vllm_hopper", "--mode", "w4a4", "--json")[1])
    assert (one["name"], list(one["serves"]), one["kernel"]["inputs"]) == ("vllm_hopper", ["w4a4"], None)
    assert one["packer"]["weights"]["mxfp4"]["rule"] == "even"


def test_a_mode_alone_is_looked_up_in_every_deployment(shown):
    code, out, _ = shown("deployments", "--mode", "w4a16")
    rows = dict(line.split()[:2] for line in out.splitlines()[2:] if line.split()[0] in DEPLOYMENTS)
    assert code == 0
    assert rows.keys() == DEPLOYMENTS.keys()
    assert (rows["vllm_blackwell"], rows["vllm_hopper"]) == ("w4a4", "w4a16")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vllm_hoper"], "no deployment is called 'vllm_hoper'; did you mean 'vllm_hopper'?"),
        (["--mode", "w4a5"], "--mode 'w4a5': no checkpoint has this mode; did you mean 'w4a4' or 'w4a8'?"),
    ],
)
def test_a_mistake_is_one_line_with_the_cure(shown, arguments, said):
    assert shown("deployments", *arguments) == (2, "", f"fp4rl: {said}\n")


def test_a_former_name_is_shown_as_what_it_was(shown):
    code, out, err = shown("deployments", "vllm")
    assert (code, out.split(":")[0]) == (0, "compressed_tensors")
    assert "deployment vllm is a former name: compressed_tensors" in words(err)


def test_the_plan_says_for_every_arm_and_profile_what_serves_it(shown, tmp_path):
    file = tmp_path / "served.yaml"
    file.write_text(SUITE)
    code, out, _ = shown("plan", str(file))
    said = words(out)
    assert code == 0
    rows = [words(line) for line in out.partition("what is served")[2].splitlines()]
    for row in (
        "bf16 - full precision as it is",
        "w4a16 vllm_blackwell w4a16 w4a4",
        "w4a8, more vllm_ascend w4a8 w4a8",
        "nv ascend950 nvfp4_w4a16 nothing",
        "own ocp (not named) of no mode not known",
        "hand ocp (not named) w4a4 w4a4",
        "odd ocp w16a4 nothing",
        "dual vllm_ascend_dualscale w4a8 not looked up",
        "every arm@w4a4 compressed_tensors w4a4 w4a4",
    ):
        assert rows.count(row) == 1, row
    for note in (
        "w4a16 on NVIDIA Blackwell (SM100): vLLM takes any MXFP4 group without FP8 inputs for W4A4",
        "w4a8 on Ascend 950: dense layers need in_features % 64 == 0",
        "nvfp4_w4a16 on Ascend 950: Ascend has no NVFP4",
        "no checkpoint has mode w16a4: it is for measuring alone",
    ):
        assert said.partition("warning:")[0].count(note) == 1, note
    assert "warning: w4a16 is computed here, but vllm_blackwell serves w4a4: vLLM takes" in said
    assert "warning: nvfp4_w4a16 is computed here, but ascend950 serves nothing of it" in said
    judged = words(shown("plan", str(file), "evaluation={count: 4, deployment: vllm_blackwell, profiles: [w4a16]}")[1])
    assert "warning: evaluation profile w4a16: w4a16 is computed here, but vllm_blackwell serves w4a4" in judged
    rows = {row["arm"]: row["served_as"] for row in json.loads(shown("plan", str(file), "--json")[1])}
    assert rows["w4a16"].startswith("vllm_blackwell: a W4A16 checkpoint is computed as W4A4")
    assert rows["nv"] == "ascend950: nothing serves an NVFP4_W4A16 checkpoint on Ascend 950: Ascend has no NVFP4"


def test_a_renamed_preset_is_said_once_a_file_and_on_the_command_line(shown, tmp_path):
    file = tmp_path / "served.yaml"
    file.write_text(SUITE.replace("deployment: vllm_ascend", "preset: vllm_ascend").replace("ascend950", "vllm_ascend"))
    code, out, err = shown("plan", str(file))
    assert code == 0
    assert words(err).count("preset vllm_ascend is now deployment: vllm_ascend_floor") == 1
    assert "w4a8, more vllm_ascend_floor w4a8 w4a8" in words(out)
    _, out, err = shown("sites", "embedded", "--mode", "w4a4", "--preset", "vllm_ascend", "--json")
    assert json.loads(out)["injection"]["deployment"] == "vllm_ascend_floor"
    assert "msModelSlim packs 4-7 % of the weights otherwise" in words(err)
    assert shown("sites", "embedded", "--preset", "ocp", "--deployment", "ocp")[2].endswith("name deployment alone\n")


def test_layers_that_a_kernel_cannot_take_are_counted(shown, tmp_path):
    file = tmp_path / "wide.yaml"
    file.write_text("model: {embedded: {hidden_size: 96, intermediate_size: 128}}\n")
    for mode, said in {
        "w4a8": "vllm_ascend has no w4a8 kernel for 12 dense layers such as model.layers.0.self_attn.q_proj: "
        "of in_features that 64 does not divide",  # q, k, v, o, gate, up of two layers; down has 128
        "w4a16": "vllm_ascend has no w4a16 kernel for 14 dense layers such as model.layers.0.self_attn.q_proj: "
        "not routed experts",
        "w4a4": None,
    }.items():
        arguments = ("sites", str(file), "--mode", mode, "--deployment", "vllm_ascend")
        assert json.loads(shown(*arguments, "--json")[1])["warnings"] == ([said] if said else [])
        out = words(shown(*arguments)[1])
        assert f"served: vllm_ascend: a {mode.upper()} checkpoint is computed as it is on Ascend 950" in out
        assert ("warning: " in out) == (said is not None)


def test_neither_the_list_nor_its_help_imports_torch():
    code = """
import sys
from fp4rl.cli.main import main
for arguments in (["--help"], [], ["vllm_ascend"], ["--mode", "w4a4", "--json"]):
    main(["deployments", *arguments])
print([name for name in ("torch", "scipy", "sqlalchemy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert "Examples:" in done.stdout
