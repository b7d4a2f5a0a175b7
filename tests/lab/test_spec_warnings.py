"""What is known before the runs: said once for the arms that share it, and not where another arm makes use of it."""

import pytest

from fp4rl.lab.catalogue import described, names
from fp4rl.lab.catalogue.rows import table
from fp4rl.lab.compare.differing import refused_beforehand
from fp4rl.lab.spec_warnings import spec_warnings
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import merge


def lines(base=None, **arms):
    described = {name: merge(base or {}, content) for name, content in arms.items()}
    return spec_warnings({name: Experiment.model_validate(content) for name, content in described.items()})


def test_two_arms_that_differ_in_a_knob_wired_to_nothing_are_said_beforehand():
    """Kind: a difference of arms that cannot act; the report said 'no difference shown' and left with 0."""
    assert lines(a={}, b={"training": {"kl_loss_type": "k2"}}) == [
        "training.kl_loss_type k2 cannot act: training.kl_loss_coef is 0, so there is no KL and no reference (arm b)"
    ]
    assert lines(a={}) == []


def test_a_setting_of_the_base_that_one_arm_uses_is_no_mistake():
    base = {"training": {"kl_loss_type": "k2"}}
    assert lines(base, a={}, b={"training": {"kl_loss_coef": 0.1}}) == []
    assert len(lines(base, a={}, b={"training": {"lr": 1e-3}})) == 1


def test_codes_of_two_bases_are_said_to_have_no_kernel():
    turned = {"name": "mxfp4", "rotation": 32}
    (line,) = lines(a={"injection": {"weight": turned, "input": "mxfp4"}})
    assert "injection.weight has the rotation 32 and injection.input none" in line
    assert lines(a={"injection": {"weight": turned, "input": turned}}) == []
    assert lines(a={"injection": {"weight": turned}}) == []  # inputs in full: the weight is turned back when it is read


@pytest.mark.parametrize(
    ("injection", "left"),
    [
        ({"mode": "w4a4", "errors": [{"scale": 0.1}]}, ["errors"]),
        ({"mode": "w4a4", "apply_during": {"input": ["rollout", "training"]}}, ["input"]),
        ({"mode": "w4a4", "apply_during": ["rollout", "training"]}, ["input", "weight"]),
        ({"mode": "w4a4", "errors": [{"scale": 0.1, "when": "backward"}]}, []),
        ({"mode": "w4a4", "grad_input": "mxfp8"}, []),
    ],
)
def test_a_deployment_that_leaves_part_of_the_injection_out_is_said(injection, left):
    """Kind: a number labelled by the description; what training met and the evaluation does not is named."""
    said = [line for line in lines(a={"injection": injection}) if "the profile deployment leaves" in line]
    assert [line.partition("injection's ")[2].partition(" out")[0] for line in said] == left
    full = {"evaluation": {"profiles": ["full"]}, "injection": injection}
    assert not [line for line in lines(a=full) if "the profile deployment leaves" in line]


@pytest.mark.parametrize(
    ("model", "own", "said"),
    [
        ({"path": "m"}, "bfloat16", True),
        ({"path": "m", "dtype": "bfloat16"}, "bfloat16", False),
        ({"path": "m", "dtype": "bfloat16"}, "float32", True),
        ({"path": "m"}, "float32", False),
        ({}, "bfloat16", False),  # nobody packs the embedded model
    ],
)
def test_a_dtype_from_which_a_packer_rounds_otherwise_is_said(model, own, said):
    """Kind: weights that are trained rounded, and are not those that the exporter makes of the saved folder."""
    injection = {"mode": "w4a8", "deployment": "vllm_ascend", "dtype": own}
    found = [line for line in lines(a={"model": model, "injection": injection}) if "give model.dtype" in line]
    assert bool(found) == said
    assert not any("give model.dtype" in line for line in lines(a={"model": model, "injection": {"mode": "w4a8"}}))
    profile = {"evaluation": {"profiles": ["w4a8"], "deployment": "vllm_ascend"}}
    assert any("give model.dtype" in line for line in lines(a={"model": {"path": "m"}, **profile}))


def test_what_a_loss_and_a_schedule_will_not_do_is_said():
    one = {"training": {"train_batch_size": 4, "mini_batch_size": 4}}
    assert "the clipping of dapo never acts" in " ".join(lines(one, a={}))
    assert not lines(one, a={"training": {"algorithm": "grpo"}})
    k1 = {"training": {"kl_loss_coef": 0.1, "kl_loss_type": "k1"}}
    assert "zero on average" in " ".join(lines(a=k1))
    assert "sequence ratio" in " ".join(lines(a={"training": {"algorithm": "gspo", "clip_ratio_high": 0.28}}))
    fade = {"schedule": {"sigma_start": 0.05, "sigma_end": 0.0005, "num_stages": 10}}
    assert "5 steps are too few" in " ".join(lines(a={"noise": fade, "training": {"steps": 5}}))


@pytest.mark.parametrize(
    ("factors", "refused"),
    [
        (["injection.deployment"], True),
        (["injection.mode"], True),
        (["injection"], False),
    ],
)
def test_a_question_that_will_be_refused_is_said_before_the_runs(factors, refused):
    """Kind: hours of training for a question whose factors leave out what comes with them."""
    arms = {name: {"injection": {"mode": "w4a4", "deployment": name}} for name in ("ascend950_uos", "ascend950")}
    question = {"question": "q", "treatment": "ascend950_uos@deployment", "control": "ascend950@deployment"}
    suite = Suite.model_validate({"suite": "s", "arms": arms, "comparisons": [question | {"factors": factors}]})
    said = list(refused_beforehand(suite))
    assert len(said) == refused
    for line in said:
        assert line.startswith("question 1 will be refused: its arms also differ in injection.")
        assert "injection.weight" in line
        assert line.endswith("; where they may, its factors must name injection")
        assert ("injection.deployment" in line) == ("injection.deployment" not in factors)


def test_no_question_of_the_catalogue_will_be_refused():
    for name in names():
        row = table().rows.get(name)
        if row is not None and row.refused:
            continue
        suite = described(name)
        assert suite.comparisons or row.control is None
        assert not list(refused_beforehand(suite))


@pytest.mark.parametrize(
    ("from_step", "over", "said"),
    [
        (16, 0, None),
        (17, 0, "only for 3 of 20 steps"),
        (10, 9, "only for 1 of 20 steps"),
        (20, 0, "in none of 20 steps"),
    ],
)
def test_a_precision_that_is_hardly_trained_with_is_said(from_step, over, said):
    schedule = {"input": {"from_step": from_step, "over": over}}
    warned = lines(a={"training": {"steps": 20}, "injection": {"mode": "w4a4", "schedule": schedule}})
    assert [line for line in warned if "schedule" in line] == (
        []
        if said is None
        else [f"injection.schedule.input: mxfp4, which is deployed and evaluated, is trained with {said}"]
    )


def test_engines_that_do_not_follow_a_changing_precision_are_refused():
    injection = {"mode": "w4a16", "schedule": {"weight": {"from_step": 2}}}
    for engine, cure in (({"engine": "verl"}, "trl"), ({"rollout": {"engine": "vllm"}}, "transformers")):
        with pytest.raises(ValueError, match=f"does not follow a precision that changes; write {cure}"):
            Experiment.model_validate({"injection": injection, **engine})
