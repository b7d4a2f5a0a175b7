"""One injection under another preset or in another format: everything else stays, and there is a way back."""

import pytest

from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.injection import Injection
from fp4rl.spec.presets import PRESETS
from fp4rl.spec.retarget import in_format, under_preset

CONTENT = {
    "mode": "w4a8",
    "by_pattern": {"*.down_proj": "mxfp8"},
    "kv_cache": "mxfp8",
    "targets": {"layers": [0]},
    "errors": [{"kind": "relative"}],
    "seed": 3,
}


def under(preset, **changes):
    return Injection.model_validate(CONTENT | {"preset": preset} | changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_another_preset_changes_the_rules_alone_and_leads_back(preset):
    found = under_preset(under("vllm"), preset)
    assert found == under(preset)
    assert under_preset(found, "vllm") == under("vllm")
    assert under_preset(under(None), preset) == under(preset)


def test_another_format_stands_where_linear_layers_are_rounded_under_the_same_preset():
    found = in_format(under("vllm"), "mxfp6_e2m3")
    assert found == under("vllm", mode=None, weight="mxfp6_e2m3", input="mxfp6_e2m3")


def test_a_rule_that_somebody_wrote_is_not_overruled():
    own = Injection.model_validate({"weight": {"name": "mxfp4", "scale_rule": "mse"}})
    with pytest.raises(InvalidValueError, match="sets scale_rule 'mse', but preset 'vllm' fixes 'even'"):
        under_preset(own, "vllm")


def test_what_cannot_be_names_the_cure():
    with pytest.raises(NotFoundError, match="did you mean 'vllm'"):
        under_preset(under("ocp"), "vlm")
    with pytest.raises(NotFoundError, match="did you mean 'mxfp4'"):
        in_format(under("ocp"), "mxfp5")
    with pytest.raises(InvalidValueError, match="rounds no linear layer"):
        in_format(Injection.named("none"), "mxfp4")
