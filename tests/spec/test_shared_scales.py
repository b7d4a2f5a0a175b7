"""What would make the sampler another policy than the trainer by the batch alone is refused, or said."""

import pytest

from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import FORMATS, NVFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.shared_scales import batch_note, shared_scales

TWO_D = {"input": "mxfp4_2d"}
BY_CALL = {"mode": "nvfp4_w4a4", "input": "nvfp4"}  # as runs of earlier versions have it written out
PER_TOKEN = {"name": "nvfp4", "factor": "per_token"}
STATIC = {"name": "fp8", "factor": "static", "calibrated": 3.5}


def test_the_formats_whose_scale_covers_several_tokens_are_these():
    """By hand from each definition: a block of more than one row, or a scale for the whole tensor."""
    assert {name for name, fmt in FORMATS.items() if fmt.spans_rows} == {"mxfp4_2d", "nvfp4", "fp8"}


@pytest.mark.parametrize(
    "injection, where",
    [
        (BY_CALL, "input nvfp4"),
        ({"weight": "mxfp4", "input": "fp8"}, "input fp8"),
        ({"weight": "mxfp4", **TWO_D}, "input mxfp4_2d"),
        ({"weight": "mxfp4", "output": "nvfp4"}, "output nvfp4"),
        ({"weight": "mxfp4", "kv_cache": "nvfp4"}, "kv_cache nvfp4"),
        ({"weight": "mxfp4", "grad_weight": "nvfp4"}, "grad_weight nvfp4"),
        ({"mode": "w4a4", "by_pattern": {"*.layers.0.*": "nvfp4"}}, "input nvfp4"),
        ({**BY_CALL, "apply_during": {"input": ["rollout"]}}, "input nvfp4"),
    ],
)
def test_a_run_whose_tokens_share_a_scale_is_refused_with_the_cure(injection, where):
    """Kind: a number that depends on the batch it was computed in, at every point that sees tokens."""
    with pytest.raises(ValueError, match=f"{where}: all tokens of a call share a scale.*its batch-mates.*per_token"):
        Experiment.model_validate({"injection": injection})


@pytest.mark.parametrize(
    "injection",
    [
        {"mode": "nvfp4_w4a16"},
        {"mode": "nvfp4_w4a4"},
        {"weight": "mxfp4_2d"},
        {"mode": "w4a4", "kv_cache": "mxfp8", "grad_input": "mxfp8"},
        {"weight": "mxfp4", "input": STATIC, "output": PER_TOKEN, "kv_cache": PER_TOKEN, "grad_input": PER_TOKEN},
    ],
)
def test_weights_may_share_what_they_like_and_tokens_each_have_their_own(injection):
    assert not shared_scales(Experiment.model_validate({"injection": injection}).injection, "rollout", "training")


def test_in_evaluation_it_is_said():
    injection = {**BY_CALL, "apply_during": {"input": ["evaluation"]}}
    evaluation = {"profiles": ["deployment", "by_call", "nvfp4_w4a4"], "injections": {"by_call": BY_CALL}}
    said = list(Experiment.model_validate({"injection": injection, "evaluation": evaluation}).warnings())
    for profile in ("deployment", "by_call"):
        assert any(f"profile {profile}: input nvfp4" in line and "batch_size" in line for line in said)
    assert not any("profile nvfp4_w4a4" in line for line in said)
    assert batch_note(Injection.model_validate(BY_CALL), "evaluation") is not None
    assert batch_note(Injection.named("nvfp4_w4a4"), "evaluation") is None
    assert batch_note(Injection.named("w4a4"), "evaluation") is None


def test_a_description_of_an_earlier_version_keeps_its_one_factor_for_a_call():
    """They wrote formats out: `input: nvfp4` under the mode that today means a factor for each token."""
    old, new = Injection.model_validate({**BY_CALL, "weight": "nvfp4"}), Injection.named("nvfp4_w4a4")
    assert old.weight == old.input == NVFP4
    assert NVFP4.factor == "tensor"
    written = new.model_dump(mode="json")
    assert (written["weight"], written["input"]) == ({"name": "nvfp4", "factor": "fused"}, PER_TOKEN)
    assert Injection.model_validate(old.model_dump(mode="json")) == old != new
    assert digest(old) != digest(new)


@pytest.mark.parametrize(
    "injection, where",
    [
        ({"weight": PER_TOKEN}, "weight nvfp4: factor per_token"),
        ({"weight": "mxfp4", "by_pattern": {"*": {"weight": STATIC}}}, "weight fp8: factor static"),
        ({"weight": "mxfp4", "grad_input": STATIC}, "grad_input fp8: factor static"),
        ({"weight": "mxfp4", "input": {"name": "nvfp4", "factor": "fused"}}, "input nvfp4: factor fused"),
    ],
)
def test_a_factor_of_tokens_is_refused_where_no_tokens_are(injection, where):
    with pytest.raises(ValueError, match=where):
        Injection.model_validate(injection)
