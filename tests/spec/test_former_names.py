"""A former name is read as what it computed, is said once, and changes no id of a run."""

import pytest
import yaml

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import PRESETS, with_present_names
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import arm_contents, former_words, load_spec, parse
from fp4rl.spec.scan import ScanRequest

# What each preset was, written down when it was renamed: scale rule and rounding of MXFP4 weights and inputs.
WERE = {
    "ocp": ("floor", "nearest_even", "floor", "nearest_even"),
    "ascend950": ("floor", "nearest_even", "floor", "nearest_even"),
    "ascend950_uos": ("uos", "nearest_even", "uos", "nearest_even"),
    "ascend950_moe": ("floor", "nearest_even", "floor", "nearest_even"),
    "vllm_ascend": ("floor", "nearest_even", "floor", "half_away"),
    "vllm": ("even", "nearest_even", "even", "nearest_even"),
    "modelopt": ("rceil", "nearest_even", "rceil", "nearest_even"),
}
# Digests of `{injection: {mode: MODE, preset: NAME}}` under the code that knew presets.
IDS = {
    ("w4a4", None): "13744dbd9e13",
    ("w4a4", "ocp"): "a7bbd773efd5",
    ("w4a4", "ascend950"): "f593de2df2bd",
    ("w4a4", "ascend950_uos"): "4ccca7bb26f8",
    ("w4a4", "ascend950_moe"): "831501e7290a",
    ("w4a4", "vllm_ascend"): "c70fcd0d49dd",
    ("w4a4", "vllm"): "33db3b00f123",
    ("w4a4", "modelopt"): "acc037e9c8aa",
    ("w4a8", None): "17eba09052b8",
    ("w4a8", "ocp"): "fbe38199bd8f",
    ("w4a8", "ascend950"): "a86d7dcbd10d",
    ("w4a8", "ascend950_uos"): "76fb0ac26386",
    ("w4a8", "ascend950_moe"): "b84ab21063b5",
    ("w4a8", "vllm_ascend"): "63b0ff7546a5",
    ("w4a8", "vllm"): "de4adeacf2ed",
    ("w4a8", "modelopt"): "6bc31dde5fac",
    ("w4a16", None): "eb68d9a79200",
    ("w4a16", "ocp"): "8e957b17483a",
    ("w4a16", "ascend950"): "7ed8cc0a9372",
    ("w4a16", "ascend950_uos"): "b8b1e13a59f0",
    ("w4a16", "ascend950_moe"): "b985821e3d1c",
    ("w4a16", "vllm_ascend"): "b1aa907f8d79",
    ("w4a16", "vllm"): "109fc580fe52",
    ("w4a16", "modelopt"): "e0373bd17e8a",
    ("nvfp4_w4a16", None): "4fc568677b02",
    ("nvfp4_w4a16", "ocp"): "9ab6b539f283",
    ("nvfp4_w4a16", "ascend950"): "fbf47e630d11",
    ("nvfp4_w4a16", "ascend950_uos"): "ada2339dfc86",
    ("nvfp4_w4a16", "ascend950_moe"): "d64dc619ea56",
    ("nvfp4_w4a16", "vllm_ascend"): "9a79df456a16",
    ("nvfp4_w4a16", "vllm"): "1f943d7ca788",
    ("nvfp4_w4a16", "modelopt"): "14ca15e63dd0",
}


@pytest.mark.parametrize("name", WERE)
def test_a_preset_is_read_as_the_deployment_that_computes_what_it_computed(name):
    injection = parse(Injection, {"mode": "w4a4", "preset": name}, "")
    assert injection.deployment == PRESETS[name] in DEPLOYMENTS
    weight, entry = injection.weight, injection.input
    assert (weight.scale_rule, weight.rounding, entry.scale_rule, entry.rounding) == WERE[name]


@pytest.mark.parametrize(("mode", "name"), IDS)
def test_runs_keep_their_ids(mode, name):
    written = (
        {"weight": "nvfp4"} if mode.startswith("nvfp4") else {}
    )  # in full, since the mode means another factor now
    injection = {"mode": mode, "preset": name, **written}
    content = {"injection": injection, "evaluation": {"preset": name or "ocp", "injections": {"own": injection}}}
    now = PRESETS.get(name)
    experiment = parse(Experiment, content, "")
    assert digest(experiment) == IDS[mode, name]
    assert digest(experiment.model_dump(mode="json")) == IDS[mode, name]
    injection = {"mode": mode, "deployment": now, **written}
    content = {"injection": injection, "evaluation": {"deployment": now or "ocp", "injections": {"own": injection}}}
    assert digest(parse(Experiment, content, "")) == IDS[mode, name]


def test_a_run_under_a_former_meaning_is_none_under_the_present_one():
    for name in ("vllm_ascend", "modelopt"):
        if name in DEPLOYMENTS:
            evaluation = {"profiles": ["w4a4"]}
            former = parse(Experiment, {"evaluation": evaluation | {"preset": name}}, "")
            assert digest(former) != digest(parse(Experiment, {"evaluation": evaluation | {"deployment": name}}, ""))


def test_a_stored_description_shows_the_rule_that_it_was_computed_with():
    stored = {
        "injection": {"mode": "w4a4", "preset": "vllm_ascend", "weight": "mxfp4"}
        | {
            "input": {"name": "mxfp4", "rounding": "half_away"},
            "by_pattern": [{"pattern": "*.preset", "weight": "mxfp8"}],
        },
        "evaluation": {"preset": "vllm", "injections": {"preset": {"mode": "w4a16", "preset": None}}},
    }
    present = with_present_names(stored)
    assert present["injection"] == {key: value for key, value in stored["injection"].items() if key != "preset"} | {
        "deployment": "vllm_ascend_floor"
    }
    assert present["evaluation"] == {
        "deployment": "compressed_tensors",
        "injections": {"preset": {"mode": "w4a16", "deployment": None}},
    }
    experiment = parse(Experiment, present, "")
    assert experiment.injection.weight.scale_rule == "floor"
    assert digest(stored) == digest(present)


SUITE = """
suite: old
base:
  evaluation: {preset: vllm, profiles: [full, w4a4, deployment]}
  injection: {mode: w4a4, preset: vllm_ascend}
arms:
  a: {}
  b: {injection.preset: ocp}
  c: {injection: {deployment: vllm_blackwell}}
  d: {training.steps: 3}
axes: {evaluation.preset: [ocp, vllm]}
comparisons:
  - {question: q, treatment: "a+deployment=ocp@full", control: "b+deployment=ocp@full", factors: [injection.preset]}
"""


def test_a_suite_with_presets_is_read_whole_and_says_each_name_once(tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE)
    suite = load_spec(file, ["arms.d.injection.preset=modelopt"])
    arms = dict(arm_contents(suite))
    names = {arm: (e.injection.deployment, e.evaluation.deployment) for arm, e in arms.items()}
    assert names["a+deployment=ocp"] == ("vllm_ascend_floor", "ocp")
    assert names["b+deployment=compressed_tensors"] == ("ocp", "compressed_tensors")
    assert names["c+deployment=ocp"] == ("vllm_blackwell", "ocp")  # over the former key of the base
    assert names["d+deployment=ocp"] == ("vllm_blackwell_rceil", "ocp")
    assert suite.comparisons[0].factors == ("injection.deployment",)
    said = former_words(file, ["arms.d.injection.preset=modelopt"])
    assert [line.partition(" (")[0] for line in said] == [
        "preset vllm is now deployment: compressed_tensors",
        "preset vllm_ascend is now deployment: vllm_ascend_floor",
        "preset ocp is now deployment: ocp",
        "preset modelopt is now deployment: vllm_blackwell_rceil",
    ]
    assert "msModelSlim packs 4-7 % of the weights otherwise" in said[1]
    assert "vllm_blackwell" in said[0]


def test_the_former_name_under_the_present_key_is_read_too(tmp_path):
    file = tmp_path / "spec.yaml"
    file.write_text("injection: {mode: w4a4, deployment: vllm}")
    assert load_spec(file).injection.deployment == "compressed_tensors"
    assert former_words(file)[0].startswith("deployment vllm is a former name: compressed_tensors (")
    file.write_text("injection: {mode: w4a4, deployment: vllm_ascend_floor}")
    assert not former_words(file)


@pytest.mark.parametrize("kind", [Injection, Evaluation, ScanRequest])
def test_both_names_at_once_are_refused(kind):
    with pytest.raises(InvalidValueError, match="preset: is the former name of deployment; name deployment alone"):
        parse(kind, {"preset": "ocp", "deployment": "ocp"}, "")


def test_in_python_the_former_argument_warns_and_computes_the_same():
    with pytest.warns(FutureWarning, match="preset vllm is now deployment: compressed_tensors"):
        assert Injection.named("w4a4", preset="vllm") == Injection.named("w4a4", "compressed_tensors")


def test_an_unknown_preset_names_the_nearest_deployment():
    with pytest.raises(InvalidValueError, match="did you mean 'ocp'"):
        parse(Injection, {"preset": "ocpp"}, "")
    with pytest.raises(InvalidValueError, match=r"unknown key|expected"):
        parse(Evaluation, yaml.safe_load("preset: [ocp]"), "")
