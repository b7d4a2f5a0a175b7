"""`fp4rl formats`: what a person and a program see, and that docs/concepts/formats.md knows everything there is."""

import json
from pathlib import Path
from typing import get_args

import pytest

from fp4rl.cli.main import main
from fp4rl.spec import formats
from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.formats import FORMATS, Element, Format, Rounding, ScaleRule, add_format
from fp4rl.spec.points import MODES

DOCS = Path(__file__).parents[2] / "docs" / "concepts" / "formats.md"


@pytest.fixture
def shown(capsys, monkeypatch):
    """`shown(arguments)` -> (exit code, standard output, standard error), on a screen of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main(["formats", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_list_names_every_format_its_bits_grid_and_largest_value_and_points_to_the_deployments(shown):
    code, out, _ = shown()
    assert code == 0
    for fmt in FORMATS.values():
        line = next(line for line in out.splitlines() if line.startswith(f"{fmt.name} "))
        assert f"{fmt.bits_per_value:.4f}".rstrip("0").rstrip(".") in line.split()
        assert f"{fmt.element.largest:.5g}" in line
    assert "0 0.5 1 1.5 2 3 4 6" in out
    for word in (*MODES, "`fp4rl deployments`"):
        assert word in out
    assert "…" not in out


def test_a_format_that_was_added_is_listed_and_shown_with_its_error(shown):
    fmt = add_format(Format("mxint4", Element("INT4", 1, 2, 3.5)))
    try:
        code, out, _ = shown()
        assert code == 0
        assert "0 0.5 1 1.5 2 2.5 3 3.5" in out
        code, out, _ = shown(fmt.name, "--json")
        assert code == 0
        assert 15 < json.loads(out)["ideal_gaussian"]["sqnr_db"] < 25
    finally:
        del formats._LISTED[fmt.name]


def test_one_format_shows_its_grid_rule_and_ideal_error(shown):
    code, out, _ = shown("mxfp4")
    assert code == 0
    for part in (
        "4.25 bits",
        "0 0.5 1 1.5 2 3 4 6",
        "floor(log2 amax) - 2",
        "18.75",
        "grid_noise",
        *DEPLOYMENTS,
        "not rounded",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_format_may_be_spelled_out(shown):
    code, out, _ = shown("{name: mxfp4, scale_rule: even, block: 16}", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["block"] == [1, 16]
    assert facts["scale_rule"] == "even"
    assert facts["ideal_gaussian"]["sqnr_db"] > 18.8


def test_the_comparison_ranks_the_formats_as_they_are(shown, monkeypatch):
    monkeypatch.setattr("fp4rl.numerics.errors.SHAPE", (64, 512))
    code, out, _ = shown("--compare", "--json")
    found = {row["format"]: row["errors"] for row in json.loads(out)}
    assert code == 0
    assert set(FORMATS) <= set(found)
    for kind in ("gaussian", "heavy_tailed", "outlier_channels"):
        error = {name: errors[kind]["relative_l2"] for name, errors in found.items()}
        assert error["bf16"] < error["mxfp8"] < error["nvfp4"] < error["mxfp4"] < error["mxfp4_sr"]
    assert found["mxfp4_2d"]["heavy_tailed"]["relative_l2"] > 1.3 * found["mxfp4"]["heavy_tailed"]["relative_l2"]


def test_the_comparison_is_a_line_a_format_on_80_columns(shown, monkeypatch):
    monkeypatch.setattr("fp4rl.numerics.errors.SHAPE", (64, 512))
    code, out, _ = shown("--compare")
    assert code == 0
    rows = out.split("\n\n")[0].splitlines()[1:]
    assert all(row.count(" %") == 3 for row in rows)
    assert [row.split()[0] for row in rows if len(row.split()) == 11] == list(FORMATS)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["mxfp5"], "did you mean 'mxfp4' or 'mxfp8'?"),
        (["mxfp4", "--compare"], "leave the name away"),
        (["{name: mxfp4, blok: 16}"], "'block'"),
        (["{name: [}"], "not valid YAML; try"),
    ],
)
def test_a_mistake_is_one_line_with_the_cure(shown, arguments, part):
    code, out, err = shown(*arguments)
    assert code == 2
    assert not out
    assert part in err
    assert len(err.strip().splitlines()) == 1


def test_the_page_names_every_format_rule_rounding_and_deployment():
    page = DOCS.read_text(encoding="utf-8")
    words = (*FORMATS, *DEPLOYMENTS, *get_args(Rounding), *(r for r in get_args(ScaleRule) if r != "amax"))
    assert [word for word in words if f"`{word}`" not in page] == []


def test_a_format_in_json_names_what_each_deployment_does_to_weights_and_inputs(shown):
    _, out, _ = shown("mxfp4", "--json")
    found = json.loads(out)["deployments"]
    assert found.keys() == DEPLOYMENTS.keys()
    assert found["vllm_blackwell"] == {"weight": "even, nearest_even", "input": "rceil, nearest_even"}
    assert found["vllm_hopper"] == {"weight": "even, nearest_even", "input": "not rounded"}
    _, out, _ = shown("{name: mxfp4, scale_rule: even}", "--json")
    found = json.loads(out)["deployments"]
    assert found["vllm_blackwell"] == {"weight": "even, nearest_even", "input": "another rule"}
    assert "ocp" not in found
