"""`fp4rl sites` says what would be harmed in a model, before anything is loaded or run."""

import json

import pytest

from fp4rl.cli.main import main

SUITE = """
suite: s
base: {model: {embedded: {num_layers: 3}}}
arms: {plain: {}, w4a4: {injection: w4a4}, mixed: {injection: {mode: w4a16, by_pattern: {"*.down_proj": mxfp8}}}}
seeds: [0]
"""


@pytest.fixture
def sites(capsys, monkeypatch):
    """`sites(arguments)` -> (exit code, standard output, standard error), 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main(["sites", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_embedded_model_in_14_places(sites):
    code, out, _ = sites("embedded", "--mode", "w4a4")
    assert code == 0
    assert "14 places = 2 layers x 7" in out
    assert "lm_head" in out
    assert max(map(len, out.splitlines())) <= 100


def test_one_line_a_place(sites):
    _, out, _ = sites("embedded", "--all")
    assert sum("_proj" in line for line in out.splitlines()) == 14


def test_a_suite_shows_its_first_arm_that_rounds_or_the_one_named(sites, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    assert "w4a4 on bfloat16" in sites(file)[1]
    _, out, _ = sites(file, "--arm", "mixed")
    assert "mxfp8" in out
    assert "21 places = 3 layers x 7" in out
    assert "28 places = 4 layers x 7" in sites(file, "model.embedded.num_layers=4")[1]
    assert "nothing is rounded" in sites(file, "--arm", "plain")[1]
    assert "did you mean 'mixed'" in sites(file, "--arm", "mixd")[2]


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
    assert "input:mxfp4 on bfloat16" in out
    assert "let the backward see unrounded numbers" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["embedded", "--mode", "w4a5"], "did you mean 'w4a"),
        (["embedded", "--preset", "vlm"], "did you mean 'vllm'"),
        (["embedded", "x=1"], "is no spec file"),
        (["embedded", "--old", "error_type"], "KEY=VALUE"),
        (["embedded", "--mode", "{weight: mxfp4, targets: {take: '*.qproj'}}"], "did you mean '*.q_proj'"),
        (["no/such/folder"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(sites, arguments, cure):
    code, _, err = sites(*arguments)
    assert code == 2
    assert cure in err
    assert "Traceback" not in err
