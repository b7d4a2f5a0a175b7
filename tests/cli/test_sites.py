"""`fp4rl sites` says what would be harmed in a model, before anything is loaded or run."""

import json

import pytest

from fp4rl.cli.main import main
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.load import load_spec

SUITE = """
suite: s
base: {model: {embedded: {num_layers: 3}}}
arms: {plain: {}, w4a4: {injection: w4a4}, mixed: {injection: {mode: w4a16, by_pattern: {"*.down_proj": mxfp8}}}}
seeds: [0]
"""


@pytest.fixture
def sites(capsys, monkeypatch):
    """`sites(arguments)` -> (exit code, standard output, standard error), 110 columns wide."""
    monkeypatch.setenv("COLUMNS", "110")

    def run(*arguments):
        code = main(["sites", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_embedded_model_in_14_places(sites):
    code, out, _ = sites("embedded", "--mode", "w4a4")
    assert code == 0
    assert "14 sites = 2 layers x 7" in out
    assert "lm_head" in out
    assert max(map(len, out.splitlines())) <= 100


def test_one_line_a_place(sites):
    _, out, _ = sites("embedded", "--all")
    assert sum("_proj" in line for line in out.splitlines()) == 14


def test_a_suite_shows_its_first_arm_that_rounds_or_the_one_named(sites, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    assert "w4a4 of values cast to bfloat16" in sites(file)[1]
    _, out, _ = sites(file, "--arm", "mixed")
    assert "mxfp8" in out
    assert "21 sites = 3 layers x 7" in out
    assert "28 sites = 4 layers x 7" in sites(file, "model.embedded.num_layers=4")[1]
    assert "nothing is rounded" in sites(file, "--arm", "plain")[1]
    assert "did you mean 'mixed'" in sites(file, "--arm", "mixd")[2]


ADAPTED = """
suite: s
base: {model: {embedded: {}, lora: {rank: 2, target_modules: [q_proj]}}, injection: {mode: w4a16}}
arms:
  merged: {injection: {mode: w4a16, lora: merged}}
  packed:
    injection: {mode: w4a16, frozen_base: packed}
    injection.apply_during: {weight: [rollout, training, evaluation, reference]}
seeds: [0]
"""


def test_the_adapter_of_a_spec_is_on_the_model_whose_sites_are_shown(sites, tmp_path):
    """Fault: without it an arm that merges or packs, and runs, was refused: 'no adapted layer is taken'."""
    file = tmp_path / "suite.yaml"
    file.write_text(ADAPTED)
    merged = {plan["site"] for plan in json.loads(sites(file, "--json")[1])["plans"] if plan.get("merged")}
    assert merged == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    packed = json.loads(sites(file, "--arm", "packed", "--json")[1])["plans"]
    assert [plan.get("packed") for plan in packed] == [True] * 14
    shown = [line for line in sites(file)[1].splitlines() if "mxfp4 merged" in line]
    assert [line.split()[0] for line in shown] == ["q"]
    assert sites(file, "--arm", "packed")[1].count("mxfp4 packed") == 7
    code, _, err = sites(file, "base.model.lora.target_modules=[qproj]")
    assert (code, "did you mean 'q_proj'" in err) == (2, True)


def test_a_deployment_takes_the_place_of_the_specs_own(sites, tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("injection: {mode: w4a16, deployment: compressed_tensors, targets: {layers: [0]}}\n")
    code, out, _ = sites(file, "--deployment", "vllm_blackwell_rceil")
    assert code == 0
    assert "mxfp4 rceil" in out
    assert "7 sites = 1 layer x 7" in out


def test_settings_of_a_format_errors_and_phases_are_in_words(sites):
    rotated = "by_pattern: {'*.down_proj': {weight: {name: mxfp4, scale_rule: even, rotation: 64, coarse: 512}}}"
    errors = "errors: [{kind: relative}, {kind: spikes, share: 0.01, scale: 3, when: both}]"
    _, out, _ = sites("embedded", "--mode", f"{{weight: mxfp4, input: mxfp8, {rotated}, {errors}}}")
    assert "mxfp4 even coarse 512 max rotation 64" in " ".join(out.split())
    assert "relative@matmul/forward 0.05" in out
    assert "spikes@matmul/both 3" in out
    assert "weight, input: in rollout, training, evaluation" in out
    assert "errors: in rollout, training" in out


def test_what_a_reader_should_know_of_a_place_is_said(sites, tmp_path):
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64}
    config |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    build_tokenizer().save_pretrained(tmp_path)
    _, out, _ = sites(tmp_path, "--mode", "{mode: w4a16, targets: {leave: ['*norm*'], opt_in: [lm_head]}}")
    assert "lm_head: TRL's training forward reads this weight without calling the layer" in out


def test_json_is_the_whole_table(sites):
    _, out, _ = sites("embedded", "--mode", "{weight: mxfp4, errors: [{kind: relative}]}", "--json")
    table = json.loads(out)
    assert len(table["plans"]) == 14
    assert table["plans"][0]["errors"][0]["kind"] == "relative"
    assert {left["reason"] for left in table["left_out"]} >= {"left by '*lm_head*'"}


def test_old_settings_are_translated_with_a_line_for_each_trap(sites):
    old = ("hw_error_injection.enabled=true", "hw_error_injection.error_type=mxfp4", "hw_error_injection.use_ste=false")
    code, out, err = sites("embedded", *(word for setting in old for word in ("--old", setting)))
    assert code == 0
    assert "input:mxfp4 of values cast to bfloat16" in out
    assert "let the backward see unrounded numbers" in " ".join(err.split())


def test_old_settings_are_written_as_a_fragment_that_a_spec_takes(sites, tmp_path):
    old = ("hw_error_injection.enabled=true", "hw_error_injection.error_type=mxfp4", "hw_error_injection.seed=1")
    old += ("'++trainer.noise_injection.enabled=True'", "noise_injection.sigma_start=0.05")
    old += ("noise_injection.sigma_end=0.0005",)
    file = tmp_path / "old.yaml"
    code, out, _ = sites("embedded", *(word for setting in old for word in ("--old", setting)), "--write", file)
    assert code == 0
    assert "noise: geometric: sigma_start 0.05, sigma_end 0.0005, num_stages 10; on norm weights in rollouts" in out
    assert f"fp4rl run SPEC +{file}\n" in out
    assert "# the" not in file.read_text().splitlines()[-1]
    assert "on in validation too" in file.read_text()
    (tmp_path / "spec.yaml").write_text("training: {steps: 3}\n")
    experiment = load_spec(tmp_path / "spec.yaml", [f"+{file}"])
    assert (experiment.injection.input.name, experiment.injection.seed) == ("mxfp4", 1)
    assert experiment.noise.schedule.sigma_start == 0.05


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["embedded", "--mode", "w4a5"], "did you mean 'w4a"),
        (["embedded", "--mode", "{weight: mxfp4"], "is not valid YAML; write a mode such as w4a4"),
        (["embedded", "--mode", "[w4a4]"], "is neither a name nor a mapping"),
        (["embedded", "--mode", "3"], "is neither a name nor a mapping"),
        (["embedded", "--mode", "{weight: mxfp4, targets: {take: '*.layers.7.*'}}"], "did you mean '*.layers.1.*'"),
        (["embedded", "--deployment", "vllm_hoper"], "did you mean 'vllm_hopper'"),
        (["embedded", "x=1"], "is no spec file"),
        (["embedded", "--old", "error_type"], "KEY=VALUE"),
        (["embedded", "--write", "x.yaml"], "no setting is given"),
        (["embedded", "--mode", "{weight: mxfp4, targets: {take: '*.qproj'}}"], "did you mean '*.q_proj'"),
        (["no/such/folder"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(sites, arguments, cure):
    code, _, err = sites(*arguments)
    assert code == 2
    assert cure in err
    assert "Traceback" not in err
