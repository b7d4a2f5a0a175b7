"""A format is a value that cannot be wrong, and its words mean one thing."""

from dataclasses import FrozenInstanceError, replace

import pytest

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    FP8,
    MXFP4,
    MXFP4_2D,
    MXFP4_SR,
    MXFP8,
    NVFP4,
    Coarse,
    Element,
    Format,
    add_format,
    describe,
    format_named,
    format_of,
)


def test_the_grid_of_e2m1_is_the_one_of_the_ocp_specification():
    assert E2M1.grid() == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize(
    ("element", "largest_normal", "smallest", "values"),
    [
        (E2M1, 6.0, 0.5, 8),
        (E2M3, 7.5, 0.125, 32),
        (E3M2, 28.0, 0.0625, 32),
        (E4M3, 448.0, 2.0**-9, 127),
        (E5M2, 57344.0, 2.0**-16, 124),
    ],
)
def test_each_element_has_the_ends_that_its_specification_names(element, largest_normal, smallest, values):
    grid = element.grid()
    assert (grid[-1], grid[1], len(grid)) == (largest_normal, smallest, values)
    assert list(grid) == sorted(set(grid))


@pytest.mark.parametrize(
    ("fmt", "bits"), [(MXFP4, 4.25), (NVFP4, 4.5), (MXFP4_2D, 4 + 8 / 1024), (MXFP8, 8.25), (FP8, 8.0), (BF16, 16.0)]
)
def test_bits_per_value_count_the_scales(fmt, bits):
    assert fmt.bits_per_value == fmt.bits_once == bits


def test_bits_per_value_count_what_is_rounded_twice():
    """Of 200 columns, 7 blocks of 32, a quarter is 2; of 64 columns, 2 blocks, it is 1."""
    fmt = replace(MXFP4, fallback=0.25)
    assert (fmt.bits_per_value, fmt.bits_once) == (5.3125, 4.25)
    assert [fmt.twice(columns) for columns in (4096, 200, 64, 8)] == [32, 2, 1, 1]
    assert [fmt.passes(columns) for columns in (4096, 200, 64)] == [1.25, 1 + 2 / 7, 1.5]
    assert replace(MXFP4, fallback=0.28).twice(25 * 32) == 7  # 0.28 * 25 is more than 7 in float64
    assert (replace(MXFP4, coarse=Coarse(128), fallback=1.0).bits_per_value, MXFP4.passes(64)) == (9.0, 1.0)


def test_a_format_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        MXFP4.scale_rule = "even"


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_found_by_its_name_and_described_by_it(name):
    assert describe(format_named(name)) == name


@pytest.mark.parametrize(
    "changed",
    [
        replace(MXFP4, scale_rule="even"),
        replace(MXFP4, block=(1, 16), rotation=32),
        replace(MXFP4_2D, block=(16, 16)),
        replace(MXFP4, coarse=Coarse(128, "search"), rounding="half_away"),
        replace(MXFP4_SR, scale_rule="floor"),
        replace(MXFP4, scale_rule="even", scale_epsilon=9.6e-7, scale_math="tensor", rounding="half_added"),
        replace(MXFP4, scale_rule="round", scale_min_exponent=-30),
        replace(NVFP4, factor="per_token", fallback=0.25),
    ],
)
def test_what_a_changed_format_is_described_as_parses_to_the_same_format(changed):
    assert format_of(describe(changed)) == changed


def test_a_mapping_starts_from_the_named_format():
    assert format_of({"name": "mxfp4", "scale_rule": "even", "block": 16}) == Format(
        "mxfp4", E2M1, block=(1, 16), scale_rule="even"
    )
    assert format_of({"name": "mxfp4", "coarse": 128}).coarse == Coarse(128)


def test_an_unknown_name_names_the_nearest_one():
    with pytest.raises(NotFoundError, match="did you mean 'mxfp4'"):
        format_named("mxpf4")


def test_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(NotFoundError, match="did you mean 'rounding'"):
        format_of({"name": "mxfp4", "roundin": "nearest_even"})


@pytest.mark.parametrize(
    "given",
    [
        {"name": "mxfp4", "block": "32"},
        {"name": "mxfp4", "block": 0},
        {"name": "mxfp4", "rotation": 24},
        {"name": "mxfp4", "scale_rule": "nearest"},
        {"name": "mxfp4", "scale_rule": "mse", "scale_epsilon": 1e-6},
        {"name": "mxfp4", "scale_rule": "mse", "scale_math": "tensor"},
        {"name": "mxfp4", "scale_epsilon": -1.0},
        {"name": "mxfp4", "scale_epsilon": float("nan")},
        {"name": "mxfp4", "scale_epsilon": "small"},
        {"name": "mxfp4", "scale_epsilon": True},
        {"name": "mxfp4", "scale_math": "double"},
        {"name": "mxfp4", "scale_min_exponent": -128},
        {"name": "mxfp4", "scale_min_exponent": 1},
        {"name": "mxfp4", "scale_min_exponent": -0.5},
        {"name": "mxfp4", "scale_min_exponent": True},
        {"name": "mxfp4", "scale_rule": "mse", "scale_min_exponent": -30},
        {"name": "nvfp4", "scale_min_exponent": -30},
        {"name": "mxfp8", "scale_rule": "fouroversix"},
        {"name": "nvfp4", "scale_epsilon": 1e-6},
        {"name": "nvfp4", "scale_math": "tensor"},
        {"name": "mxfp4", "rounding": "nearest"},
        {"name": "mxfp4", "coarse": 100},
        {"name": "mxfp4", "coarse": {"columns": 512, "choice": "best"}},
        {"name": "mxfp8", "scale_rule": "uos"},
        {"name": "nvfp4", "scale_rule": "floor"},
        {"name": "nvfp4", "coarse": 128},
        {"name": "bf16", "rounding": "stochastic"},
        {"name": "fp8", "block": 32},
        *({"name": "mxfp4", "fallback": share} for share in (0, -0.5, 1.5, float("nan"), True, "half")),
        {"name": "mxfp4", "fallback": 0.25, "rotation": 32},
        {"name": "mxfp4_sr", "fallback": 0.25},
        {"name": "mxfp4_2d", "fallback": 0.25},
        {"name": "nvfp4", "fallback": 0.25},
        {"name": "fp8", "factor": "per_token", "fallback": 0.25},
        {"name": "bf16", "fallback": 0.25},
        {"scale_rule": "even"},
        32,
        True,
    ],
)
def test_a_value_that_cannot_stand_there_is_refused(given):
    with pytest.raises(InvalidValueError):
        format_of(given)


@pytest.mark.parametrize("wrong", [("E2M1", 2, 1, 5.0), ("E2M1", 2, 1, 12.0), ("E2M1", 2, 1, 0.5), ("E0M3", 0, 3, 7.0)])
def test_an_element_whose_largest_value_is_not_on_its_grid_is_refused(wrong):
    with pytest.raises(InvalidValueError):
        Element(*wrong)


def test_a_name_is_listed_once():
    with pytest.raises(InvalidValueError, match="'mxfp4'"):
        add_format(replace(MXFP4, block=(1, 16)))
    assert FORMATS["mxfp4"] is MXFP4
