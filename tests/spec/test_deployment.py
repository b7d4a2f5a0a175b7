"""A deployment is a packer times a kernel: what each does to weights and to inputs, and what it serves."""

from dataclasses import replace

import pytest

from fp4rl.spec.deployment import DEPLOYMENTS, deployment_named
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.formats import FP8, MXFP4, MXFP4_2D, MXFP4_SR, MXFP6_E2M3, MXFP8, NVFP4, Coarse
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse
from fp4rl.spec.points import MODES

ROUNDING_INPUTS = [name for name, deployment in DEPLOYMENTS.items() if deployment.kernel.inputs]
EVEN, HALF_AWAY, ADDED = "nearest_even", "half_away", "half_added"


def rules(name, point, fmt=MXFP4):
    found = deployment_named(name).at(point, fmt)
    return (
        found.scale_rule,
        found.rounding,
        found.scale_epsilon,
        found.scale_math,
        found.coarse and found.coarse.columns,
        found.scale_min_exponent,
    )


def whole(rules):
    """Rule and rounding, with what is usual of the rest: no epsilon, exact arithmetic, no FP32 scale, no least one."""
    return (*rules, *(0.0, "exact", None, None)[len(rules) - 2 :])


def test_mxfp4_without_a_deployment_means_ocp():
    assert deployment_named("ocp").at("weight", MXFP4) == deployment_named("ocp").at("input", MXFP4) == MXFP4


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "inputs8"),
    [
        ("ocp", ("floor", EVEN), ("floor", EVEN), ("floor", EVEN)),
        ("compressed_tensors", ("even", EVEN), ("even", EVEN), ("even_e2m1", EVEN)),
        ("vllm_blackwell", ("even", EVEN), ("rceil", EVEN), ("rceil", EVEN)),
        ("vllm_ascend", ("even", ADDED, 9.6e-7, "tensor"), ("floor", HALF_AWAY), ("floor", EVEN)),
        ("vllm_ascend_ceil_x", ("uos", ADDED, 9.6e-7, "tensor"), ("floor", HALF_AWAY), ("floor", EVEN)),
        ("vllm_ascend_fouroversix", ("fouroversix", ADDED, 0.0, "tensor"), ("floor", HALF_AWAY), ("floor", EVEN)),
        (
            "vllm_ascend_dualscale",
            ("even", ADDED, 9.6e-7, "float32", 512),
            ("floor", EVEN, 0.0, "exact", 512),
            ("floor", EVEN),
        ),
        (
            "vllm_ascend_dualscale_64",
            ("even", ADDED, 9.6e-7, "float32", 64),
            ("floor", EVEN, 0.0, "exact", 64),
            ("floor", EVEN),
        ),
        ("modelopt", ("rceil", "half_toward_zero", 0.0, "float32"), ("rceil", EVEN), ("rceil", EVEN)),
        ("amct", ("round", HALF_AWAY, 0.0, "float32", None, -30), ("floor", EVEN), ("floor", EVEN)),
        ("vllm_blackwell_rceil", ("rceil", EVEN), ("rceil", EVEN), ("rceil", EVEN)),
        ("vllm_ascend_floor", ("floor", EVEN), ("floor", HALF_AWAY), ("floor", HALF_AWAY)),
        ("ascend950", ("floor", EVEN), ("floor", EVEN), ("floor", EVEN)),
        ("ascend950_uos", ("uos", EVEN), ("uos", EVEN), ("floor", EVEN)),
    ],
)
def test_the_packer_rounds_weights_and_the_kernel_inputs(name, weights, inputs, inputs8):
    assert rules(name, "weight") == whole(weights)
    assert rules(name, "input") == whole(inputs)
    assert rules(name, "input", MXFP8) == whole(inputs8)


def test_every_deployment_is_in_the_table_above():
    listed = test_the_packer_rounds_weights_and_the_kernel_inputs.pytestmark[0].args[1]
    assert {row[0] for row in listed} | {"vllm_hopper", "ascend950_moe"} == set(DEPLOYMENTS)


def test_eight_bit_weights_are_msmodelslims_own_too():
    assert rules("vllm_ascend", "weight", MXFP8) == whole(("floor", ADDED, 0.0, "tensor"))


def test_columns_of_an_fp32_scale_are_the_formats_own_where_it_names_some():
    dual = deployment_named("vllm_ascend_dualscale")
    fmt = replace(MXFP4, coarse=Coarse(64))
    assert dual.at("weight", fmt).coarse == Coarse(64)
    assert dual.at("weight", dual.at("weight", fmt)) == dual.at("weight", fmt)
    assert dual.at("kv_cache", MXFP4) == dual.at("output", MXFP4) == MXFP4


def test_a_deployment_reaches_every_power_of_two_format():
    even = deployment_named("compressed_tensors")
    assert even.at("weight", MXFP4_2D) == replace(MXFP4_2D, scale_rule="even")
    assert even.at("weight", MXFP6_E2M3).scale_rule == "even"


@pytest.mark.parametrize("fmt", [NVFP4, FP8, MXFP4_SR])
@pytest.mark.parametrize("name", ROUNDING_INPUTS)
def test_formats_that_nobody_rounds_otherwise_pass_unchanged(fmt, name):
    assert deployment_named(name).at("weight", fmt) == deployment_named(name).at("input", fmt) == fmt


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_applying_a_deployment_twice_is_applying_it_once_and_can_be_taken_back(name):
    deployment = deployment_named(name)
    for point in ("weight", "input") if name in ROUNDING_INPUTS else ("weight",):
        once = deployment.at(point, MXFP4)
        assert deployment.at(point, once) == once
        assert deployment.without_rules(point, once) == MXFP4


def test_a_rule_that_the_format_sets_itself_is_not_overruled_in_silence():
    with pytest.raises(InvalidValueError, match="sets scale_rule 'even', but deployment 'ocp' fixes 'floor'"):
        deployment_named("ocp").at("weight", replace(MXFP4, scale_rule="even"))


@pytest.mark.parametrize("name", ROUNDING_INPUTS)
def test_no_deployment_rounds_a_block_twice(name):
    for fmt in (replace(MXFP4, fallback=0.25), replace(NVFP4, factor="per_token", fallback=0.25)):
        with pytest.raises(InvalidValueError, match=f"deployment '{name}' rounds no block twice.*leave deployment out"):
            deployment_named(name).at("input", fmt)


def test_an_unknown_deployment_names_the_nearest():
    with pytest.raises(NotFoundError, match="did you mean 'ascend950'"):
        deployment_named("ascend95")


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_entry_says_its_source_and_serves_modes_that_there_are(name):
    deployment = deployment_named(name)
    assert deployment.packer.source
    assert deployment.kernel.source
    for mode, served in deployment.kernel.serves.items():
        assert {mode, served.mode} - {None} <= MODES.keys()
        assert served.note or served.mode == mode, "a mode that changes says why"


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w16a4", "nvfp4_w4a4", "w4a4_out"])
def test_a_mode_that_rounds_inputs_is_refused_where_the_kernel_leaves_them_alone(mode):
    said = r"deployment 'vllm_hopper' rounds no \w+s: its kernel .* in 16 bits; take mode w4a16, or nvfp4_w4a16"
    with pytest.raises(InvalidValueError, match=said):
        parse(Injection, {"mode": mode, "deployment": "vllm_hopper"}, "")
    with pytest.raises(InvalidValueError, match=f"profiles: {mode}: {said}"):
        parse(Evaluation, {"profiles": [mode], "deployment": "vllm_hopper"}, "")


def test_weights_alone_and_caches_are_rounded_there_as_elsewhere():
    injection = Injection.named("w4a16", "vllm_hopper", kv_cache="mxfp8")
    assert (injection.weight.scale_rule, injection.kv_cache) == ("even", MXFP8)
