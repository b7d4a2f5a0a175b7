"""Sixty and more architectures, tiny: each computes under every mode what an independent float64 oracle computes,
gradients included, or is refused with the reason that docs/models.md gives."""

import pytest
import zoo_families as families
import zoo_table as table

import zoo


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family_is_exact_or_refused_by_name(family):
    model = families.tiny(family)
    found = {mode: zoo.outcome(model, mode) for mode in zoo.MODES}
    assert found == table.read()[family]


def test_the_page_names_every_family_and_no_other():
    assert list(table.read()) == sorted(families.FAMILIES)
    assert len(families.FAMILIES) >= 60


def test_a_refusal_names_the_site_or_the_setting_and_the_cure():
    refusals = {said for row in table.read().values() for said in row.values() if said != zoo.EXACT}
    assert refusals
    assert all(said.startswith("refused: ") for said in refusals)
    assert all("leave" in said for said in refusals), refusals


@pytest.mark.parametrize(
    "described",
    [
        {"mode": "w4a16", "fused_groups": "free", "by_pattern": {"*.layers.1.self_attn.q_proj": {"weight": "none"}}},
        {"mode": "w4a4", "by_pattern": {"*.layers.1.mlp.experts.down_proj": {"input": "none"}}},
        {"mode": "w4a16", "deployment": "compressed_tensors"},
        {"mode": "nvfp4_w4a16", "weight": "nvfp4"},
    ],
    ids=["one layer is left", "inputs of one layer's experts are left", "another scale rule", "a factor a matrix"],
)
def test_the_oracle_sees_what_is_not_rounded_as_it_should_be(described, monkeypatch):
    monkeypatch.setitem(zoo.MODES, described["mode"], described)
    with pytest.raises(AssertionError, match="off the oracle"):
        zoo.outcome(families.tiny("qwen3_moe"), described["mode"])
