"""A word or a mapping becomes an injection that says what it does and survives a round trip through JSON."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.formats import FORMATS, MXFP4, MXFP8, NVFP4
from fp4rl.spec.injection import MODES, Injection

parse = Injection.model_validate


@pytest.mark.parametrize(
    ("mode", "weight", "inputs", "output"),
    [
        ("none", None, None, None),
        ("w4a16", MXFP4, None, None),
        ("w4a8", MXFP4, MXFP8, None),
        ("w4a4", MXFP4, MXFP4, None),
        ("w16a4", None, MXFP4, None),
        ("w8a8", MXFP8, MXFP8, None),
        ("nvfp4_w4a16", replace(NVFP4, factor="fused"), None, None),
        ("nvfp4_w4a4", replace(NVFP4, factor="fused"), replace(NVFP4, factor="per_token"), None),
        ("w4a4_out", MXFP4, None, MXFP4),
    ],
)
def test_each_mode_names_its_points(mode, weight, inputs, output):
    injection = parse(mode)
    assert (injection.weight, injection.input, injection.output) == (weight, inputs, output)
    assert injection == Injection.named(mode)
    assert injection.name == mode


def test_the_table_above_is_the_whole_table():
    assert len(MODES) == 9


@pytest.mark.parametrize(
    ("mode", "deployment"),
    [
        (mode, name)
        for mode in MODES
        for name in (None, *DEPLOYMENTS)
        if name != "vllm_hopper" or not (MODES[mode].input or MODES[mode].output)  # refused: no input is rounded there
    ],
)
def test_every_mode_under_every_deployment_survives_a_round_trip(mode, deployment):
    injection = Injection.named(mode, deployment=deployment)
    assert parse(json.loads(json.dumps(injection.model_dump(mode="json")))) == injection


def test_a_deployment_sets_the_rules_of_its_target():
    injection = Injection.named("w4a4", deployment="vllm_ascend_floor")
    assert (injection.weight.rounding, injection.input.rounding) == ("nearest_even", "half_away")


def test_a_deployment_applies_to_formats_named_by_hand_too():
    assert parse({"weight": "mxfp4", "deployment": "compressed_tensors"}).weight.scale_rule == "even"


def test_no_exceptions_may_be_written_as_an_empty_mapping():
    assert parse({"mode": "w4a4", "by_pattern": {}}) == parse({"mode": "w4a4"})


def test_a_table_of_patterns_keeps_its_order_and_its_meaning():
    injection = parse({"mode": "w4a4", "by_pattern": {"*.down_proj": "mxfp8", "*.q_proj": {"input": "none"}}})
    first, second = injection.by_pattern
    assert (first.weight, first.input, first.output) == (MXFP8, MXFP8, "keep")
    assert (second.weight, second.input, second.output) == ("keep", None, "keep")
    assert parse(json.loads(json.dumps(injection.model_dump(mode="json")))) == injection


def test_a_bare_list_of_phases_stands_for_all_points():
    during = parse({"mode": "w4a4", "apply_during": ["training", "rollout"]}).apply_during
    assert during.weight == during.input == ("rollout", "training")


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        ({"mode": "w4a5"}, "did you mean 'w4a"),
        ({"weight": "mxpf4"}, "did you mean 'mxfp4'"),
        ({"weight": "mxfp4", "deployment": "vllm_hoper"}, "did you mean 'vllm_hopper'"),
        ({"mode": "w4a16", "input": "mxfp4"}, "drop `mode`"),
        ({"mode": "w4a16", "weight": "nvfp4", "output": "mxfp8"}, "drop `mode`"),
        ({"mode": "w4a16", "wieght": "mxfp4"}, "Extra inputs"),
        ({"mode": "w4a16", "apply_during": []}, "at least 1"),
        ({"mode": "w4a16", "by_pattern": {"*.q_proj": {}}}, "names no format"),
        ({"mode": "w4a16", "by_pattern": {"*.[q": "mxfp8"}}, "never closed"),
        (7, "valid dictionary"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_cure(content, cure):
    with pytest.raises(ValidationError, match=cure):
        parse(content)


def test_an_unknown_mode_by_name_is_not_there():
    with pytest.raises(NotFoundError, match="w4a4"):
        Injection.named("w4a44")


def test_every_registered_format_may_stand_at_every_point():
    for name in FORMATS:
        assert parse({"weight": name, "input": name, "output": name}).weight.name == name


def test_an_injection_without_a_mode_is_named_by_its_points():
    assert parse({"weight": "mxfp4", "input": "mxfp8"}).name == "weight:mxfp4+input:mxfp8"
    assert parse({"mode": "w4a4", "by_pattern": {"*.down_proj": "mxfp8"}}).name == "w4a4+by_pattern"
    assert parse({}).is_nothing


@pytest.mark.parametrize("point", ["weight", "output", "kv_cache", "grad_input", "grad_weight"])
def test_a_fallback_is_for_inputs_alone(point):
    with pytest.raises(ValueError, match=f"{point} mxfp4: fallback is for inputs"):
        Injection.model_validate({point: {"name": "mxfp4", "fallback": 0.25}})


def test_a_fallback_goes_under_no_deployment_and_changes_no_injection_without_it():
    own = {"mode": "w4a4", "input": {"name": "mxfp4", "fallback": 0.25}}
    with pytest.raises(ValueError, match="mxfp4 with a fallback: deployment 'vllm_ascend' rounds no block twice"):
        Injection.model_validate(own | {"deployment": "vllm_ascend"})
    made = Injection.model_validate(own)
    assert Injection.model_validate(made.model_dump(mode="json")) == made
    assert "fallback" not in str(Injection.named("w4a4").model_dump(mode="json"))
