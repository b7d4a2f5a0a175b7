"""The label beside a number says what acted while it was measured; all labels here were worked out by hand."""

import pytest

from fp4rl.inject.label import label
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import embedded_skeleton
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded

MODEL = embedded_skeleton(Embedded())  # 2 layers of 7 linear layers each
POLICY = ["rollout", "training"]
DOWN = {"*.down_proj": "mxfp8"}


@pytest.mark.parametrize(
    "injection, said",
    [
        ("w4a4", "w4a4"),
        ({"weight": "mxfp8"}, "weight:mxfp8"),
        ({"weight": "mxfp4", "input": "mxfp8"}, "w4a8"),
        ({"mode": "w4a4", "by_pattern": DOWN}, "w4a4, 2 sites mxfp8"),
        ({"mode": "w4a16", "by_pattern": DOWN}, "w4a16, 2 sites mxfp8"),
        ({"mode": "w4a4", "by_pattern": {"*.down_proj": {"input": "mxfp8"}}}, "w4a4, 2 sites w4a8"),
        ({"mode": "w4a4", "by_pattern": {"*.down_proj": {"input": "none"}}}, "w4a4, 2 sites w4a16"),
        ({"mode": "w4a4", "by_pattern": {"*.down_proj": "none"}}, "w4a4, 2 sites not rounded"),
        ({"mode": "w4a4", "targets": {"layers": [0]}}, "w4a4, 7 sites not rounded"),
        ({"mode": "w4a4", "apply_during": {"input": POLICY}}, "w4a16: no input in evaluation"),
        ({"mode": "w4a4", "kv_cache": "mxfp8"}, "w4a4, kv_cache:mxfp8"),
        ({"errors": [{"scale": 0.05}]}, "clean: no errors in evaluation"),
        ({"mode": "w4a4", "errors": [{"scale": 0.05}]}, "w4a4: no errors in evaluation"),
        ({"errors": [{"scale": 0.05}], "apply_during": {"errors": ["evaluation"]}}, "relative 0.05@matmul"),
        ({"mode": "w4a4", "apply_during": POLICY}, "clean: no weight and input in evaluation"),
        ({"grad_input": "mxfp8"}, "full"),
        ({"mode": "none"}, "full"),
    ],
)
def test_the_label_is_made_from_what_acted_in_the_phase(injection, said):
    """Kind: a label made from the description lies when a phase leaves part of it out."""
    assert label(resolve(MODEL, Injection.model_validate(injection))) == said


def test_the_label_of_another_phase_says_what_acts_there():
    table = resolve(MODEL, Injection.model_validate({"mode": "w4a4", "apply_during": {"input": ["evaluation"]}}))
    assert (label(table), label(table, "rollout"), label(None)) == ("w4a4", "w4a16: no input in rollout", "full")
