"""What an evaluation profile means, what stands beside every number, and the robustness sweep of the last step."""

from copy import deepcopy
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from fp4rl.cli.eval_view import shares_table
from fp4rl.cli.main import main
from fp4rl.inject.label import label
from fp4rl.inject.resolve import resolve
from fp4rl.models.load import embedded_skeleton
from fp4rl.rl.answered import Evaluation, Item, answers_digest
from fp4rl.rl.profiles import precision_named
from fp4rl.rl.verify import weights_digest
from fp4rl.spec import evaluation as spec
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError
from fp4rl.spec.evidence import Evaluation as Shares
from fp4rl.spec.evidence import Profile
from fp4rl.spec.injection import PHASES, Injection
from fp4rl.spec.model import Embedded
from planted.records import gaps_of

VLLM = spec.Evaluation(deployment="compressed_tensors")
W4A4 = Injection.named("w4a4", deployment="compressed_tensors")
PROFILE = Profile(name="full", precision="full", scorer="arithmetic")


def items(*right):
    """One problem a tuple, one sample an element."""
    return tuple(
        Item(strict, strict, True, problem_id=f"p{p}", sample=k, completion="", length=3, truncated=False)
        for p, answers in enumerate(right)
        for k, strict in enumerate(answers)
    )


@pytest.mark.parametrize(
    "name, said, noise",
    [
        ("full", "full", "off"),
        ("deployment", "w4a4", "off"),
        ("w4a16", "w4a16", "off"),
        ("mxfp8", "weight:mxfp8", "off"),
        ("matmul_noise=0", "w4a4", "off"),
        ("matmul_noise=0.05", "w4a4, relative 0.05@matmul", "matmul relative 0.05"),
        ("mine", "w4a4, 7 sites mxfp8, relative 0.1@matmul", "off"),
    ],
)
def test_a_profile_says_what_acted_and_its_noise(name, said, noise):
    """Kind: the label beside a number; it is read off the site table, and an injection of one's own is a profile."""
    mine = {"mode": "w4a4", "by_pattern": {"*.layers.0.*": "mxfp8"}, "errors": [{"scale": 0.1}]}
    asked = spec.Evaluation(
        deployment="compressed_tensors", injections={"mine": {"injection": mine}}, profiles=("full", "mine")
    )
    found = precision_named(name, asked, W4A4)
    table = resolve(embedded_skeleton(Embedded()), found.injection) if found.injection is not None else None
    assert (label(table), found.noise) == (said, noise)


def test_a_formats_profile_follows_the_deployment_of_the_target():
    assert precision_named("mxfp4", VLLM, None).injection.weight.scale_rule == "even"
    assert precision_named("mxfp4", spec.Evaluation(deployment="ocp"), None).injection.weight.scale_rule == "floor"


@pytest.mark.parametrize(
    "name, kind", [("w4a17", NotFoundError), ("mxfp5", NotFoundError), ("matmul_noise=much", InvalidValueError)]
)
def test_a_profile_that_means_nothing_is_refused(name, kind):
    with pytest.raises(kind, match=r"evaluation\.profiles"):
        precision_named(name, VLLM, W4A4)


def test_matmul_noise_acts_in_the_evaluation_alone_and_replaces_what_was_trained_with():
    trained = Injection.model_validate({"mode": "w4a4", "errors": [{"scale": 0.3}]})
    found = precision_named("matmul_noise=0.05", VLLM, trained).injection
    assert [error.scale for error in found.errors] == [0.05]
    assert found.apply_during.errors == ("evaluation",)


def test_the_sweep_belongs_to_the_last_step_and_names_what_it_measured(run, experiment):
    sweep = {"matmul_noise": [0.0, 0.5], "formats": ["bf16", "mxfp8", "nvfp4", "mxfp4"], "profiles": ["deployment"]}
    _, heard = run(experiment("w4a16", evaluation={**sweep, "count": 64}))
    first = [e for e in heard.evaluations if not e.last]
    last = {e.profile.name: e for e in heard.evaluations if e.last}
    assert [e.profile.name for e in first] == ["deployment"]
    assert list(last) == ["deployment", "matmul_noise=0", "matmul_noise=0.5", "bf16", "mxfp8", "nvfp4", "mxfp4"]
    digests = {name: e.profile.sites_digest for name, e in last.items()}
    assert digests["matmul_noise=0"] == digests["mxfp4"] == digests["deployment"], "W4A16 is MXFP4 weights"
    assert len(set(digests.values())) == 5
    assert last["matmul_noise=0"].items == last["deployment"].items
    assert last["matmul_noise=0.5"].items != last["deployment"].items


def test_every_evaluation_says_what_it_rounded_and_that_the_masters_are_unharmed(run, experiment):
    _, heard = run(experiment("w4a16", evaluation={"profiles": ["full", "deployment", "w4a4"], "count": 8}))
    imitated = {e.profile.name: e.profile.deployment for e in heard.evaluations}
    assert imitated == {"full": None, "deployment": "compressed_tensors", "w4a4": "compressed_tensors"}
    rows = [row for row in heard.of("injection") if row["phase"] == "evaluation"]
    found = {(row["step"], row["profile"], row["point"]) for row in rows}
    points = [("deployment", "weight"), ("w4a4", "weight"), ("w4a4", "input")]
    assert found == {(step, *point) for step in (0, 2) for point in points}
    assert all(row["calls"] > 0 and row["relative_error"] > 0.05 for row in rows)
    masters = [(row["step"], row["profile"], row["unharmed"]) for row in heard.of("master") if "profile" in row]
    assert masters == [(step, name, True) for step in (0, 2) for name in ("full", "deployment", "w4a4")]


def test_what_acts_in_training_alone_does_not_make_the_evaluation_another_one(run, experiment):
    plain, rounding = (
        run(experiment("w4a16", injection=changes, training={"steps": 1}), name)[1].evaluations[-1]
        for name, changes in {"a": {"seed": 3}, "b": {"seed": 4, "grad_input": "mxfp8"}}.items()
    )
    assert plain.profile.sites_digest == rounding.profile.sites_digest is not None


def test_an_injection_that_never_runs_ends_the_evaluation(run, experiment, monkeypatch):
    monkeypatch.setattr("fp4rl.rl.evaluate.answer", lambda *_: ())
    with pytest.raises(CheckFailed, match="never called during evaluation"):
        run(experiment("w4a16"))


def test_profiles_after_a_packed_deployment_see_the_unrounded_weights(run, experiment, model_cache):
    """Taking a packed injection out leaves rounded weights: `full` measured after it would be W4A16 under that name."""
    lora = {"lora": {"rank": 2, "alpha": 4.0}}
    packed = {"frozen_base": "packed", "apply_during": {"weight": list(PHASES)}}
    steps, profiles = {"steps": 1, "lr": 1e-9}, ["deployment", "full"]
    _, heard = run(experiment("w4a16", model=lora, training=steps, injection=packed, evaluation={"profiles": profiles}))
    after = {e.profile.name: e.items for e in heard.evaluations if not e.last}
    _, alone = run(experiment("bf16", model=lora, training=steps, evaluation={"profiles": ["full"]}), "alone")
    assert after["full"] == alone.evaluations[0].items != after["deployment"]


def test_a_name_twice_in_profiles_and_sweep_is_refused(experiment):
    with pytest.raises(ValueError, match="named twice"):
        experiment("bf16", evaluation={"profiles": ["full", "mxfp8"], "formats": ["mxfp8"]})


def test_pass_at_k_is_the_unbiased_estimate_and_mean_at_k_the_mean():
    found = (
        Evaluation(0, True, PROFILE, items((True, False, False, False), (False,) * 4, (True,) * 4)).summary().as_json()
    )
    assert found["mean@4"] == pytest.approx(5 / 12)
    assert found["pass@1"] == pytest.approx(5 / 12)
    assert found["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)  # 1 - C(3,2)/C(4,2) = 1/2
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["problems"] == 3


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_keeps_the_names_of_precisions_whole(width):
    counted = {"n": 1319, "mean_length": 256.0, "of_samples": {"pass@16": 1.0}}
    profile = Profile(name="matmul_noise=0.05", max_new_tokens=768)
    shares = dict.fromkeys(("strict", "flexible", "formatted", "truncated"), 1.0)
    out = Console(width=width, file=StringIO())
    out.print(shares_table("a model", [Shares(step=0, profile=profile, **shares, **counted)]))
    assert "matmul_noise=0.05" in out.file.getvalue()


def test_one_answer_a_problem_has_no_pass_at_k():
    assert not [
        name for name in Evaluation(0, True, PROFILE, items((True,), (False,))).summary().as_json() if "@" in name
    ]


@pytest.mark.slow
def test_several_samples_differ_and_repeat_with_the_seed(run, experiment):
    changes = {"evaluation": {"samples": 3, "count": 8, "profiles": ["full"]}, "training": {"steps": 1}}
    first, second = (run(experiment("bf16", **changes), name)[1].evaluations[0] for name in ("a", "b"))
    assert first.items == second.items
    assert len({(i.problem_id, i.completion) for i in first.items}) > 8
    assert first.profile.sampling == "3 samples at temperature 1"


def test_fp4rl_eval_shows_the_sweep_with_intervals(run, experiment, capsys):
    trained, _ = run(experiment("bf16", training={"steps": 1}))
    words = ["eval", str(trained.final), "--count", "8", "--deployment", "compressed_tensors", "--max-new-tokens", "16"]
    code = main([*words, "-p", "w4a4", "--sweep", "--samples", "2"])
    shown = capsys.readouterr().out
    assert code == 0
    swept = (*(f"matmul_noise={size}" for size in (0, 0.01, 0.02, 0.05, 0.1)), "bf16", "mxfp8", "nvfp4", "mxfp4")
    assert all(name in shown for name in ("w4a4", *swept, "pass@2", "Wilson"))


def test_an_injection_of_evaluations_alone_trains_as_without_it_and_proves_itself(run, experiment):
    """Kind: a treatment that acts in one phase only; it was refused with 'its spec injects nothing'."""
    later = {"mode": "w4a4", "apply_during": ["evaluation"]}
    plain, _ = run(experiment("bf16", evaluation={"count": 8}), "plain")
    trained, heard = run(experiment("bf16", injection=later, evaluation={"count": 8}), "later")
    assert trained.evidence.final_weights == plain.evidence.final_weights
    spec = experiment("bf16", injection=later, evaluation={"count": 8}).model_dump(mode="json")
    lines = [*heard.records, *({"kind": "evaluation", **e.summary().as_json()} for e in heard.evaluations)]
    assert gaps_of(spec, trained.evidence.as_json(), lines) == ()
    tables = {e.profile.name: e.profile.sites_digest is not None for e in heard.evaluations}
    assert tables == {"full": False, "deployment": True}


def test_the_digest_of_weights_is_of_their_bits_and_names():
    """By hand: one bit, one name, one dtype or one frozen weight more make another policy, or none."""
    model = torch.nn.Linear(3, 2, bias=False)
    before = weights_digest(model)
    assert before == weights_digest(deepcopy(model))
    other = deepcopy(model)
    other.weight.data.view(torch.int32)[0, 0] ^= 1
    assert weights_digest(other) != before
    assert weights_digest(deepcopy(model).to(torch.bfloat16)) != before
    assert weights_digest(torch.nn.Sequential(model)) != before


def test_the_digest_of_answers_is_of_what_was_said():
    first, other = items((True, False)), items((True, True))
    assert answers_digest(first) == answers_digest(other), "scores are made from the answers"
    assert answers_digest(first) != answers_digest((replace(first[0], completion="18"), first[1]))
    assert answers_digest(first) != answers_digest(first[:1])
