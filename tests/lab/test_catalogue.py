"""Every experiment of the documents is a row that plans, says what it says it says, and trains at the tiny scale."""

import json
import re
from typing import get_args

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.budget import equal_control
from fp4rl.lab.catalogue import described, names
from fp4rl.lab.catalogue.reported import reported
from fp4rl.lab.catalogue.rows import Scale, table
from fp4rl.lab.compare.controls import missing_controls
from fp4rl.lab.compare.differing import refused_beforehand
from fp4rl.lab.matrix import planned, single
from fp4rl.lab.work import execute_run
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import arm_contents

ROWS = table().rows
PLANNED = [name for name, row in ROWS.items() if row.refused is None]
REFUSED = [name for name, row in ROWS.items() if row.refused is not None]


def own(name, scale):
    """The experiment of a row, seed 0."""
    return next(run.experiment for run in planned(described(name, scale)) if (run.arm, run.seed) == (name, 0))


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("name", PLANNED)
def test_every_row_plans_beside_its_control_and_asks_a_question(name, scale):
    suite, row = described(name, scale), ROWS[name]
    assert suite.suite == (name if scale == "full" else f"{name}-tiny")
    assert set(suite.arms) == {name} | ({row.control} if row.control else set())
    assert bool(suite.comparisons) == bool(suite.criteria) == bool(row.control)
    assert suite.about == row.about
    assert all(known in reported() for known in suite.reported)


@pytest.mark.parametrize("name", REFUSED)
def test_an_original_that_never_could_act_is_refused_with_the_reason(name, capsys):
    assert main(["plan", f"catalogue/{name}"]) == 2
    assert ROWS[name].refused in capsys.readouterr().err


FORMATS = {"MXFP4": "mxfp4", "NVFP4": "nvfp4"}
SIMPLE = {"W4A16": {"weight"}, "W4A4": {"weight", "input"}, "W16A4": {"input"}}
# Rows that correct their original, or lay its blocks otherwise; what differs stands in their `about`.
CORRECTED = {"w16a4": "noise", "nvfp4-v1": "", "e13c": "", "e13f": "", "e12-2ep": "noise"}


@pytest.mark.parametrize("name", [name for name in PLANNED if ROWS[name].reported])
def test_a_row_has_the_settings_that_were_reported(name):
    """The oracle is the record of the documents, by its own words."""
    record, experiment = reported()[ROWS[name].reported[0]].settings, own(name, "full")
    recipe, injection, noise = experiment.training, experiment.injection, experiment.noise
    assert recipe.algorithm == record["algorithm"].lower()
    if batch := record.get("batch"):
        theirs = {"train": recipe.train_batch_size, "n": recipe.rollout_n, "lr": recipe.lr}
        theirs |= {"ppo_mini": recipe.mini_batch_size} if "ppo_mini" in batch else {}
        assert theirs == {key: batch[key] for key in theirs}
    if record.get("steps"):
        assert recipe.steps == record["steps"] or abs(recipe.steps - record["steps"]) == 1
    assert (experiment.model.lora is not None) == ("lora" in record)
    if record["format"] in FORMATS and "output" not in record["injection_point"]:
        formats = {point: getattr(injection, point) for point in ("weight", "input", "output")}
        assert {point for point, given in formats.items() if given} == SIMPLE[record["quant_mode"]]
        assert {given.name for given in formats.values() if given} == {FORMATS[record["format"]]}
    wanted = record.get("noise")
    assert (noise is not None) == (wanted is not None)
    if wanted and CORRECTED.get(name) != "noise":
        schedule = noise.schedule
        assert (schedule.sigma_start, schedule.sigma_end) == (wanted["sigma_start"], wanted["sigma_end"])
        assert noise.targets.kinds == (("linear",) if wanted["targets"] == "linear" else ("norm",))
    if "hw_noise" in record:
        assert [error.scale for error in injection.errors] == [
            {"matmul 1e-4 fwd+bwd": 1e-4, "matmul 1e-3 fwd+bwd": 1e-3}.get(record["hw_noise"], 0.05)
        ]


def test_layers_of_noise_lie_where_they_lay_and_spread_over_a_smaller_model():
    factors = own("e9b", "full").noise.multipliers
    at = {layer: 1.5 if 14 <= layer <= 17 else 1.2 for layer in range(10, 22)}
    assert dict(factors.by_layer) == at
    assert factors.others == 1.0
    assert dict(own("e9a", "full").noise.multipliers.by_layer) == dict.fromkeys(range(14, 18), 1.0)
    assert dict(own("e9b", "tiny").noise.multipliers.by_layer) == {1: 1.2, 2: 1.5, 3: 1.2}


def test_the_ends_that_are_left_out_are_those_of_the_model():
    assert {"*layers.0.*", "*layers.27.*"} <= set(own("e13h", "full").injection.targets.leave)
    assert {"*layers.0.*", "*layers.3.*"} <= set(own("e13h", "tiny").injection.targets.leave)


def test_what_was_reported_is_complete_unique_and_names_nobody():
    assert len(reported()) == 97
    text = "\n".join(json.dumps(record.settings) + record.sentence() for record in reported().values())
    assert not re.search(r"https?:|/home/|/root/|github|@feature|\.txt\b", text)
    assert reported()["E6b"].accuracy == 67.48
    assert reported()["E6b"].step == 20
    assert any("step 20 of 29" in reason for reason in reported()["E6b"].confounds)
    assert all(0 <= record.accuracy <= 100 for record in reported().values() if record.accuracy is not None)


@pytest.mark.parametrize(
    ("name", "treatment", "seeds", "steps"),
    [
        ("w4a4_recipe", "w4a4_qad", 7, (30, 60, 90)),
        ("w4a4_late", "rl_and_qad", 7, (60, 30, 90)),
        ("w4a4_embedded_m", "first", 5, (20, 40, 60)),
        ("w4a4_embedded_m_90", "first", 5, (30, 60, 90)),
        ("w4a4_methods", "fallback", 5, (30, 60, 90)),
    ],
)
def test_a_recipe_of_w4a4_asks_at_equal_budget_over_seeds_that_were_named(tmp_path, name, treatment, seeds, steps):
    """By hand: the steps of the start and its own are those of the control, in one cosine."""
    suite = described(name)
    arms = dict(arm_contents(suite))
    assert len(suite.seeds) == seeds
    assert [*refused_beforehand(suite)] == [*missing_controls(suite, tmp_path)] == []
    assert {question.margin for question in suite.comparisons if question.test == "reaches"} == {0.01}
    control = equal_control(arms[treatment], [arms["bf16"]], like=arms["bf16_equal"])
    assert control == arms["bf16_equal"]
    assert tuple(arms[arm].training.steps for arm in ("bf16", treatment, "bf16_equal")) == steps
    assert control.training.lr_scheduler == "cosine"


@pytest.mark.slow
def test_the_recipe_of_w4a4_is_run_and_judged_by_a_command_each(tmp_path, capsys):
    """Two seeds of fewer and smaller steps, in the same proportions: every question is answered, at equal budget."""
    small = [
        "train_batch_size=4",
        "mini_batch_size=2",
        "rollout_n=4",
        "filter_groups={enable: false}",
        "entropy_coeff=1e-3",
    ]
    steps = [f"arms.{arm}.training.steps={n}" for n, arm in ((1, "bf16"), (1, "w4a4_short"), (2, "w4a4_qad"))]
    steps += ["training.steps=3", "arms.w4a4_qad_layer0.training.steps=2"]
    others = ["seeds=[101,102]", "evaluation.count=16", "model.embedded.warm_up_steps=60"]
    runs = ["--runs", str(tmp_path)]
    words = [*(f"training.{word}" for word in small), *steps, *others]
    assert main(["run", "catalogue/w4a4_recipe", *words, *runs, "--jobs", "1"]) == 0
    capsys.readouterr()
    assert main(["compare", "w4a4_recipe", *runs, "--json"]) in (0, 1)
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == 4
    for answer in answers:
        assert {each["kind"] for each in answer["objections"]} <= {"identical", "evidence"}, answer["objections"]
    staged = next(answer["budgets"] for answer in answers if answer["budgets"])
    assert staged["equal"] is True
    assert (staged["treatment"]["stages"]["steps"], staged["treatment"]["own"]["steps"]) == (1, 2)
    assert all(
        staged[side]["own"][what] > 0 for side in ("treatment", "control") for what in ("tokens", "cpu_s", "wall_s")
    )


def test_names_and_scales_are_one_line_errors(capsys):
    assert len(names()) == len(set(names()))
    assert main(["plan", "catalogue/e6bb"]) == 2
    assert "did you mean 'e6b'" in capsys.readouterr().err
    assert main(["plan", "catalogue/quickstart", "--scale", "full"]) == 2
    assert "has one scale" in capsys.readouterr().err
    with pytest.raises(NotFoundError):
        described("nothing")
    with pytest.raises(InvalidValueError):
        described("quickstart", "tiny")


def test_plan_shows_prediction_reported_numbers_and_bands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "catalogue/e6b"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("predicted 1 to 2 points above E6a", "E6b reported 67.48 % at step 20", "log lost, unverified"):
        assert part in said
    assert "bands of e6b@deployment minus e6a@deployment, accuracy at the end: pass from -1, marginal from -3" in said
    assert "power not known, no repeats of this task and model in the ledger" in said
    assert main(["plan", "catalogue/e6b", "--next"]) == 0
    assert "no run counts yet" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_every_row_trains_two_steps_at_the_tiny_scale(name, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / "catalogue"  # the start models are shared
    content = own(name, "tiny").model_dump(exclude_unset=True)
    # a fade of each epoch is silent in its first stage, so it takes more steps to see noise
    steps = 10 if ROWS[name].kind == "epoch_aware" else 2
    content["training"] |= {
        "steps": steps,
        "train_batch_size": 4,
        "mini_batch_size": 2,
        "filter_groups": {"enable": False},
    }
    content["evaluation"] |= {"count": 16}
    experiment = Experiment.model_validate(content)
    run = single(experiment, f"rows-{name}")
    folder = execute_run(run, root)
    result = folder.result()
    assert result.steps_done == steps
    assert {e.profile.name for e in result.evaluations if e.last} == set(experiment.evaluation.profiles)
    sites = sum(1 for plan in folder.sites().plans)
    assert (sites > 0) == (experiment.injection is not None and experiment.injection != Injection())


@pytest.mark.parametrize("name, size, weights", [("embedded_m", "m", 1.9e6), ("embedded_l", "l", 41e6)])
def test_the_larger_test_beds_plan_three_arms_of_five_seeds(name, size, weights):
    suite = described(name)
    experiments = [run.experiment for run in planned(suite)]
    assert len(experiments) == 15
    assert {e.model.embedded.size for e in experiments} == {size}
    wide, inner = experiments[0].model.embedded.hidden_size, experiments[0].model.embedded.intermediate_size
    count = experiments[0].model.embedded.num_layers * (4 * wide**2 + 3 * wide * inner)
    assert count == pytest.approx(weights, rel=0.05)  # embedding, norms and biases are left out
    fitting = Experiment.model_validate({"model": f"embedded-{size}"})  # the suite writes out what is the default
    assert {(e.training.lr, e.task) for e in experiments} == {(fitting.training.lr, fitting.task)}
