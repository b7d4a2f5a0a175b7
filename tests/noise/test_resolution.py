"""What BF16 can hold of a noise, in closed form, against drawing it; and the verb that shows it."""

import json
import math
from collections import Counter

import pytest
import torch

from fp4rl.cli.main import main
from fp4rl.cli.terminal import heat_strip, log_curve
from fp4rl.noise.schedule import share_bf16_can_change


@pytest.mark.parametrize("value", [1.0, 1.5, -0.3, 0.0078125, 3.0])
@pytest.mark.parametrize("sigma", [0.0005, 0.002, 0.01])
def test_the_closed_form_equals_what_drawing_finds(value, sigma):
    clean = torch.full((400_000,), value).bfloat16()
    drawn = sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found = float(((clean.float() + drawn).bfloat16() != clean).double().mean())
    stored = float(clean[0])
    assert share_bf16_can_change({stored: 1}, sigma, "additive") == pytest.approx(found, abs=0.004)


def test_multiplicative_noise_is_relative_to_the_weight():
    shares = [share_bf16_can_change({value: 1}, 0.002, "multiplicative") for value in (1.0, 4.0, 0.0)]
    assert shares[0] == shares[1] > 0
    assert shares[2] == 0.0


def test_values_are_weighted_by_how_often_they_occur():
    both = share_bf16_can_change(Counter({1.0: 3, 0.001: 1}), 0.0005, "additive")
    assert both == pytest.approx(0.25, abs=0.01)


def test_a_curve_has_its_ends_labelled_and_silence_left_empty():
    lines = log_curve([0.0, 0.0, 0.1, 0.01], width=4, height=4)
    assert lines[0].split() == ["0.1", "│", "█"]
    assert lines[3] == "     0.01 │  ██"  # the smallest value fills its row: no bar lies on the axis
    assert lines[4:] == ["          └────", "     step  0  3"]
    assert log_curve([0.0, 0.0], width=4) == ["(silent at every step)"]


def test_a_constant_is_one_row():
    assert log_curve([0.1, 0.1, 0.1], width=3)[:2] == ["      0.1 │███", "          └───"]


def test_a_long_run_fits_the_width_and_keeps_its_peak():
    lines = log_curve([0.001] * 500 + [0.1] + [0.001] * 499, width=60)
    assert max(len(line) for line in lines) <= 71
    assert "█" in lines[0]


def test_a_heat_strip_has_one_cell_a_layer():
    assert heat_strip([0.0, 5.0, 10.0, None, math.nan], 0.0, 10.0).plain == "059··"


@pytest.fixture
def spec(tmp_path):
    file = tmp_path / "noisy.yaml"
    file.write_text(
        "training: {steps: 29}\n"
        "noise: {schedule: {kind: geometric, num_stages: 10}, multipliers: {by_layer: {0: 2.0}}}\n"
    )
    return file


def test_the_verb_prints_every_step_for_a_program(spec, capsys):
    assert main(["schedule", str(spec), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["schedules"]
    assert len(found["sigma"]) == 29
    assert found["sigma"][3] == 0.05
    assert found["stages"][-1]["bf16_share_changed"] < 0.001
    assert found["multipliers"][0] == {"layer": 0, "at_start": 2.0, "at_end": 2.0}


def test_the_verb_warns_of_stages_that_bf16_swallows_and_of_runs_too_short(spec, capsys):
    assert main(["schedule", str(spec), "training.steps=7", "model.dtype=bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "mostly swallowed" in shown
    assert "too short to reach sigma" in shown


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["model.dtype=float32"], "weights are float32"),
        (["model.dtype=bfloat16", "noise.precision=float32"], "the norms"),
    ],
)
def test_the_verb_says_that_nothing_is_swallowed_where_nothing_is_written_in_bf16(spec, capsys, words, why):
    assert main(["schedule", str(spec), *words]) == 0
    shown = capsys.readouterr().out
    assert "mostly swallowed" not in shown
    assert f"swallows none of it: {why}" in shown


def test_arms_that_differ_in_multipliers_alone_share_one_curve(tmp_path, capsys):
    file = tmp_path / "suite.yaml"
    file.write_text(
        "suite: zones\nseeds: [0]\nbase: {training: {steps: 29}}\narms:\n"
        "  even: {noise: {schedule: geometric}}\n"
        "  first: {noise: {schedule: geometric, multipliers: {by_layer: {0: 2.0}, others: 0.0}}}\n"
    )
    assert main(["schedule", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("step  0") == 1
    assert "first: sigma as in even" in shown
    assert "0:2" in shown


def test_the_verb_says_what_to_do_about_a_spec_without_noise(tmp_path, capsys):
    file = tmp_path / "quiet.yaml"
    file.write_text("training: {steps: 3}\n")
    assert main(["schedule", str(file)]) == 2
    assert "add `noise:" in capsys.readouterr().err


def test_the_norm_weights_of_a_model_folder_decide_what_bfloat16_holds(spec, tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"model.layers.0.norm.weight": torch.full((8,), 0.01)}, tmp_path / "model.safetensors")
    assert main(["schedule", str(spec), "--model", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["schedules"]
    assert found["stages"][-1]["bf16_share_changed"] > 0.9
