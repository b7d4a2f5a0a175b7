"""A preset is what one deployment target does, to weights and to inputs."""

from dataclasses import replace

import pytest

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import FP8, MXFP4, MXFP4_2D, MXFP4_SR, MXFP8, NVFP4
from fp4rl.spec.presets import PRESETS, preset_named


def test_mxfp4_without_a_preset_means_ocp():
    assert preset_named("ocp").at("weight", MXFP4) == preset_named("ocp").at("input", MXFP4) == MXFP4


@pytest.mark.parametrize(
    ("name", "rule"),
    [("ocp", "floor"), ("ascend950", "floor"), ("ascend950_uos", "uos"), ("vllm", "even"), ("modelopt", "rceil")],
)
def test_a_preset_fixes_rule_and_rounding_together(name, rule):
    for fmt in (preset_named(name).at("weight", MXFP4), preset_named(name).at("input", MXFP4)):
        assert (fmt.scale_rule, fmt.rounding) == (rule, "nearest_even")


def test_weights_and_inputs_may_differ():
    preset = preset_named("vllm_ascend")
    assert preset.at("weight", MXFP4).rounding == "nearest_even"
    assert preset.at("input", MXFP4).rounding == "half_away"


def test_a_preset_reaches_every_power_of_two_format():
    assert preset_named("vllm").at("weight", MXFP4_2D) == replace(MXFP4_2D, scale_rule="even")


def test_the_rule_for_eight_bits_is_the_one_that_the_target_has_for_them():
    assert preset_named("ascend950_uos").at("input", MXFP8).scale_rule == "floor"
    assert preset_named("vllm").at("input", MXFP8).scale_rule == "even_e2m1"


@pytest.mark.parametrize("fmt", [NVFP4, FP8, MXFP4_SR])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_formats_that_no_target_rounds_otherwise_pass_unchanged(fmt, preset):
    assert preset.at("weight", fmt) == preset.at("input", fmt) == fmt


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_applying_a_preset_twice_is_applying_it_once(preset):
    assert preset.at("input", preset.at("input", MXFP4)) == preset.at("input", MXFP4)
    assert preset.source


def test_a_rule_that_the_format_sets_itself_is_not_overruled_in_silence():
    with pytest.raises(InvalidValueError, match="sets scale_rule 'even', but preset 'modelopt' fixes 'rceil'"):
        preset_named("modelopt").at("weight", replace(MXFP4, scale_rule="even"))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(NotFoundError, match="did you mean 'ascend950'"):
        preset_named("ascend95")
