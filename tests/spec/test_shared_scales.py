"""What would make the sampler another policy than the trainer by the batch alone is refused, or said."""

import pytest

from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import FORMATS
from fp4rl.spec.injection import Injection, batch_note, shared_scales

TWO_D = {"input": "mxfp4_2d"}


def test_the_formats_whose_scale_covers_several_tokens_are_these():
    """By hand from each definition: a block of more than one row, or a scale for the whole tensor."""
    assert {name for name, fmt in FORMATS.items() if fmt.spans_rows} == {"mxfp4_2d", "nvfp4", "fp8"}


@pytest.mark.parametrize(
    "injection, where",
    [
        ({"mode": "nvfp4_w4a4"}, "input nvfp4"),
        ({"weight": "mxfp4", "input": "fp8"}, "input fp8"),
        ({"weight": "mxfp4", **TWO_D}, "input mxfp4_2d"),
        ({"weight": "mxfp4", "output": "nvfp4"}, "output nvfp4"),
        ({"weight": "mxfp4", "kv_cache": "nvfp4"}, "kv_cache nvfp4"),
        ({"weight": "mxfp4", "grad_weight": "nvfp4"}, "grad_weight nvfp4"),
        ({"mode": "w4a4", "by_pattern": {"*.layers.0.*": "nvfp4"}}, "input nvfp4"),
        ({"mode": "nvfp4_w4a4", "apply_during": {"input": ["rollout"]}}, "input nvfp4"),
    ],
)
def test_a_run_whose_tokens_share_a_scale_is_refused_with_the_cure(injection, where):
    """Kind: a number that depends on the batch it was computed in, at every point that sees tokens."""
    with pytest.raises(ValueError, match=f"{where}: all tokens of a call share a scale.*take MXFP4"):
        Experiment.model_validate({"injection": injection})


@pytest.mark.parametrize(
    "injection",
    [{"mode": "nvfp4_w4a16"}, {"weight": "mxfp4_2d"}, {"mode": "w4a4", "kv_cache": "mxfp8", "grad_input": "mxfp8"}],
)
def test_weights_may_share_what_they_like(injection):
    assert not shared_scales(Experiment.model_validate({"injection": injection}).injection, "rollout", "training")


def test_in_evaluation_it_is_said():
    injection = {"mode": "nvfp4_w4a4", "apply_during": {"input": ["evaluation"]}}
    described = Experiment.model_validate({"injection": injection, "evaluation": {"profiles": ["full", "nvfp4_w4a4"]}})
    assert any("nvfp4_w4a4: input nvfp4" in line and "batch_size" in line for line in described.warnings())
    assert batch_note(Injection.named("nvfp4_w4a4"), "evaluation") is not None
    assert batch_note(Injection.named("w4a4"), "evaluation") is None
