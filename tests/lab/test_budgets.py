"""What both sides of a comparison took, counted by hand over their stages, and what follows where it is unequal."""

import json
import shutil
from dataclasses import asdict

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab.budget import equal_control
from fp4rl.lab.matrix import planned
from fp4rl.lab.report.checks import checks
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.headline import headline
from fp4rl.lab.runs import read_run
from fp4rl.lab.spent import NOT_KNOWN, Spending, Spent
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import merge

UNTOUCHED = {"sites": 0, "calls": {}, "master_unharmed": True}
QUANTIZED = {"sites": 14, "calls": {"training": 9, "rollout": 9}, "master_unharmed": True}
BEGUN = {"repeats_steps": 0, "repeats_s": 0.0, "repeats_cpu_s": 0, "repeats_tokens": 0}
RESUMED = {"repeats_steps": 5, "repeats_s": 10.0, "repeats_cpu_s": 15.0, "repeats_tokens": 1000}
FULL = {"precision": "full", "sites_digest": None, "name": "full"}


def logged(run, tokens, cpu_s, step_s, attempts=(BEGUN,)):
    """Metrics of every step of a run as they are logged, and its attempts."""
    for step in range(1, run.result().steps_done + 1):
        run.add_metrics(step, {"tokens/rollout": tokens, "time/cpu_s": cpu_s, "time/step_s": step_s})
    for attempt in attempts:
        run.add_attempt(**attempt)
    return run


@pytest.fixture
def staged(make_run):
    """`staged(seeds)`: bf16 of 30 steps, and qad of 60 that starts from it and learns from it, of each seed."""

    def make(seeds=(0,), attempts=(BEGUN, RESUMED), starts=True, device="cpu", processes=1):
        for seed in seeds:
            mine = UNTOUCHED | {"final_files": f"f{seed}", "inputs": {"start model": "base"}, "processes": processes}
            first = make_run("bf16", seed, 0.90 + 0.01 * seed, profile=FULL, evidence=mine, device=device)
            logged(first, tokens=100.0, cpu_s=2.0, step_s=1.0)
            link = {"arm": "bf16", "digest": digest({k: v for k, v in first.spec().items() if k != "seed"})}
            taught = {"steps": 60, "distillation": {"teacher": link}}
            spec = {"start": link if starts else None, "training": taught, "injection": {"weight": "mxfp4"}}
            theirs = {"start model": f"f{seed}" if starts else "base", "teacher": f"f{seed}"}
            evidence = QUANTIZED | {"inputs": theirs, "processes": processes}
            second = make_run("qad", seed, 0.95 + 0.01 * seed, spec=spec, evidence=evidence, device=device)
            logged(second, tokens=200.0, cpu_s=3.0, step_s=2.0, attempts=attempts)
        return first, second

    return make


def test_stages_and_what_was_repeated_are_counted_and_a_teacher_that_is_one_once(staged):
    """By hand: 30 steps of 100 tokens, 2 s of CPU and 1 s, then 60 of 200, 3 s and 2 s, and 5 in vain."""
    _, second = staged()
    total = Spending().of(read_run(second, curves=False))
    assert total.stages == Spent(30, 60, 3840, repeated=0, tokens=3000, cpu_s=60, gpu_s=0, wall_s=30)
    assert total.own == Spent(60, 120, 7680, repeated=5, tokens=13_000, cpu_s=195, gpu_s=0, wall_s=130)
    assert total.whole == Spent(90, 180, 11_520, repeated=5, tokens=16_000, cpu_s=255, gpu_s=0, wall_s=160)
    assert (total.teacher, total.in_all) == (None, total.whole)
    assert Spending().of(read_run(second)) == total  # with curves that are read already


def test_a_teacher_that_is_no_stage_is_shown_apart_and_is_part_of_the_budget(staged):
    """By hand: 60 steps from the start model, and 30 that trained the teacher."""
    _, second = staged(starts=False)
    total = Spending().of(read_run(second))
    assert (total.stages.steps, total.whole.steps, total.teacher.steps, total.in_all.steps) == (0, 60, 30, 90)
    assert total.in_all.tokens == 16_000


def test_gpus_count_for_every_process_and_those_of_a_server_are_not_known(staged, make_run):
    _, second = staged(device="cuda", processes=4)
    assert Spending().of(read_run(second)).whole.gpu_s == 4 * 160
    served = make_run("served", spec={"rollout": {"server": "http://host"}}, device="cuda")
    assert Spending().of(read_run(logged(served, 1.0, 1.0, 1.0))).own.gpu_s is None


@pytest.mark.parametrize(
    ("attempts", "unknown"),
    [
        ((), {"repeated", "tokens", "cpu_s", "gpu_s", "wall_s"}),
        (({"repeats_steps": 0, "repeats_s": 0.0},), set()),  # of an older version: nothing was repeated
        (({"repeats_steps": 5, "repeats_s": 9.0},), {"tokens", "cpu_s"}),
    ],
)
def test_what_a_run_did_not_record_is_not_known(staged, attempts, unknown):
    _, second = staged(attempts=attempts)
    own = asdict(Spending().of(read_run(second)).own)
    assert {name for name, value in own.items() if value is None} == unknown


def test_a_step_that_did_not_log_its_tokens_is_no_guess(staged):
    _, second = staged()
    lines = (second.path / "metrics.jsonl").read_text().splitlines()
    (second.path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    own = Spending().of(read_run(second)).own
    assert own.tokens is own.cpu_s is own.wall_s is None
    assert own.steps == 60


@pytest.mark.parametrize("how", ["gone", "other weights"])
def test_a_stage_that_is_not_here_as_it_was_is_not_known(staged, how):
    first, second = staged()
    if how == "gone":
        shutil.rmtree(first.path)
    else:
        result = json.loads((first.path / "result.json").read_text())
        result["evidence"]["final_files"] = "another"
        (first.path / "result.json").write_text(json.dumps(result))
    total = Spending().of(read_run(second))
    assert total.stages == total.whole == NOT_KNOWN
    assert total.own.steps == 60


def compared(tmp_path, capsys, *words, control="bf16"):
    """Exit code, and the one answer."""
    sides = ("qad", control, "--runs", str(tmp_path / "runs"), "--json")
    code = main(["compare", *sides, *words])
    return code, json.loads(capsys.readouterr().out)[0]


FACTORS = ("--factor", "injection", "--factor", "precision", "--factor", "start", "--factor", "training.distillation")


def test_other_steps_are_refused_with_the_cure_and_compared_where_they_are_a_factor(staged, tmp_path, capsys):
    staged(range(3), attempts=(BEGUN,))
    code, answer = compared(tmp_path, capsys, *FACTORS[:4])
    assert code == 1
    (step,) = [each for each in answer["objections"] if each["kind"] == "step"]
    assert (step["treatment"], step["control"]) == ("60", "30")
    assert step["cure"] == "where that is meant, declare it as a factor (training.steps)"
    code, answer = compared(tmp_path, capsys, *FACTORS, "--factor", "training.steps")
    assert (code, answer["objections"]) == (0, [])
    assert answer["verdict"]["difference"] == pytest.approx(5.0)
    why = "at unequal budget: qad took 90 steps with its stages, bf16 took 30 steps; more training alone may explain it"
    assert answer["verdict"]["why"].endswith(why)
    assert (answer["budgets"]["equal"], answer["quotable"]) == (False, False)
    assert answer["budgets"]["control"]["own"]["tokens"] == 3000


def test_steps_alone_must_be_declared_too_and_are_then_the_question_itself(make_run, tmp_path, capsys):
    for seed in range(3):
        for arm, steps in (("bf16", 30), ("qad", 60)):
            share = 0.9 + 0.01 * seed + steps / 2000
            make_run(arm, seed, share, spec={"training": {"steps": steps}}, evidence=UNTOUCHED, profile=FULL)
    assert compared(tmp_path, capsys)[0] == 1
    code, answer = compared(tmp_path, capsys, "--factor", "training.steps")
    assert code == 0
    assert answer["verdict"]["why"].endswith("at unequal budget: qad took 60 steps, bf16 took 30 steps")
    assert answer["equal_control"] is None


def test_a_schedule_that_decays_on_one_side_is_told(make_run, tmp_path, capsys):
    for seed in range(3):
        for arm, schedule, weight in (("bf16", "constant", None), ("qad", "cosine", "mxfp4")):
            spec = {"training": {"lr_scheduler": schedule}, "injection": weight and {"weight": weight}}
            evidence = QUANTIZED if weight else UNTOUCHED
            make_run(arm, seed, 0.8 + 0.01 * seed + 0.1 * bool(weight), spec=spec, evidence=evidence)
    _, answer = compared(tmp_path, capsys, "--factor", "injection", "--factor", "training.lr_scheduler")
    assert (
        "at unequal schedule: cosine against constant; other training alone may explain it" in answer["verdict"]["why"]
    )
    assert answer["budgets"]["equal"] is True


@pytest.mark.parametrize("starts", [True, False])
def test_a_recipe_and_the_control_made_equal_to_it_are_of_equal_budget(staged, make_run, tmp_path, capsys, starts):
    """The start model + QAD to a trained arm takes 60 + 30 steps: its control of 90 was called unequal."""
    staged(range(3), attempts=(BEGUN,), starts=starts)
    stage, recipe = (Experiment.model_validate({"training": {"steps": steps}}) for steps in (30, 60))
    steps = equal_control(recipe, [stage]).training.steps
    for seed in range(3):
        inputs = {"inputs": {"start model": "base"}, "processes": 1}
        make_run("long", seed, 0.9, spec={"training": {"steps": steps}}, evidence=UNTOUCHED | inputs, profile=FULL)
    _, answer = compared(tmp_path, capsys, *FACTORS, "--factor", "training.steps", control="long")
    assert answer["objections"] == []
    assert answer["budgets"]["equal"] is True
    assert "unequal budget" not in answer["verdict"]["why"]
    _, answer = compared(tmp_path, capsys, *FACTORS, "--factor", "training.steps")
    also = "stages" if starts else "teacher"
    assert f"at unequal budget: qad took 90 steps with its {also}, bf16 took 30 steps" in answer["verdict"]["why"]


def test_a_common_stage_that_is_gone_leaves_what_differs_to_be_told(staged, make_run, tmp_path, capsys):
    """By hand: both start from the same 30 steps, which nobody can read any more; 60 and 20 steps are their own."""
    firsts = [staged([seed], attempts=(BEGUN,))[0] for seed in range(3)]
    for seed, first in enumerate(firsts):
        link = {"arm": "bf16", "digest": digest({k: v for k, v in first.spec().items() if k != "seed"})}
        mine = {"inputs": {"start model": f"f{seed}"}, "processes": 1}
        spec = {"start": link, "training": {"steps": 20}}
        make_run("short", seed, 0.9, spec=spec, evidence=UNTOUCHED | mine, profile=FULL)
        shutil.rmtree(first.path)
    words = ("--factor", "injection", "--factor", "precision", "--factor", "training.distillation")
    _, answer = compared(tmp_path, capsys, *words, "--factor", "training.steps", "--force", control="short")
    assert "at unequal budget: qad took 60 steps, short took 20 steps" in answer["verdict"]["why"]


SUITE = {
    "suite": "recipe",
    "seeds": [0, 1, 2],
    "base": {"training": {"steps": 30}, "evaluation": {"profiles": ["full"]}},
    "arms": {
        "bf16": {},
        "qad": {
            "start": {"arm": "bf16"},
            "injection": "w4a4",
            "training": {"steps": 60, "lr_scheduler": "cosine", "distillation": {}},
            "evaluation": {"profiles": ["deployment"]},
        },
    },
    "comparisons": [
        {
            "question": "Is it as good?",
            "treatment": "qad@deployment",
            "control": "bf16@full",
            "factors": ["injection", "start", "training.steps", "training.lr_scheduler", "training.distillation"],
            "test": "reaches",
            "margin": 0.01,
        }
    ],
}


def planned_text(tmp_path, capsys, monkeypatch, suite):
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    assert main(["plan", str(file), "--runs", str(tmp_path / "runs")]) == 0
    return capsys.readouterr().out


def test_a_plan_names_the_equal_budget_control_and_what_it_prints_can_be_pasted(tmp_path, capsys, monkeypatch):
    text = planned_text(tmp_path, capsys, monkeypatch, SUITE)
    said = "control arm bf16 has 30 steps, the treatment qad 90 steps with its stages and a learning rate that decays"
    assert f"{said}: add an arm of 90 steps" in " ".join(text.split())
    pasted = yaml.safe_load(text[text.index("  arms:") :])
    assert pasted["arms"] == {"bf16_equal": {"training": {"steps": 90, "lr_scheduler": "cosine"}}}
    (question,) = pasted["comparisons"]
    assert (question["control"], question["margin"]) == ("bf16_equal@full", 0.01)
    whole = merge(SUITE, {"arms": pasted["arms"]}) | {"comparisons": [*SUITE["comparisons"], question]}
    text = planned_text(tmp_path, capsys, monkeypatch, whole)
    assert "unequal budget" not in text
    assert "will be refused" not in text
    without = planned_text(tmp_path, capsys, monkeypatch, merge(SUITE, {"arms": pasted["arms"]}))
    assert "compare it with bf16_equal@full, which trains as long" in " ".join(without.split())
    assert "arms" not in yaml.safe_load(without[without.index("  comparisons:") :])


@pytest.mark.parametrize("starts", [True, False])
def test_a_plan_counts_an_arm_that_teaches_once(tmp_path, capsys, monkeypatch, starts):
    own = {"training": {"distillation": {"teacher": {"arm": "bf16"}}}} | ({} if starts else {"start": None})
    suite = merge(SUITE, {"arms": {"qad": own}})
    text = planned_text(tmp_path, capsys, monkeypatch, suite)
    said = f"the treatment qad 90 steps with its {'stages' if starts else 'teacher'} and a learning rate that decays"
    assert f"{said}: add an arm of 90 steps" in " ".join(text.split())


def test_a_plan_names_what_no_whole_batch_makes_equal_and_asks_no_more(tmp_path, capsys, monkeypatch):
    """By hand: 300 updates from 11,520 answers are 4.8 prompts of 8 answers each."""
    suite = merge(SUITE, {"arms": {"qad": {"training": {"mini_batch_size": 4}}}})
    factors = [*suite["comparisons"][0]["factors"], "training.mini_batch_size"]
    suite |= {"comparisons": [suite["comparisons"][0] | {"factors": factors}]}
    text = planned_text(tmp_path, capsys, monkeypatch, suite)
    said = "add an arm of 75 steps, which takes 12,000 answers, since no whole batches make updates and answers equal"
    assert said in " ".join(text.split())
    added = yaml.safe_load(text[text.index("  arms:") :])
    whole = merge(suite, {"arms": added["arms"]}) | {"comparisons": [*suite["comparisons"], *added["comparisons"]]}
    again = planned_text(tmp_path, capsys, monkeypatch, whole)
    assert "unequal budget" not in again
    assert "will be refused" not in again


def test_a_plan_asks_for_a_control_that_decays_where_the_treatment_does(tmp_path, capsys, monkeypatch):
    decaying = {"injection": "w4a4", "training": {"lr_scheduler": "cosine"}, "evaluation": {"profiles": ["deployment"]}}
    arms = {"bf16": {}, "qad": decaying}
    question = SUITE["comparisons"][0] | {"factors": ["injection", "training.lr_scheduler"]}
    text = planned_text(tmp_path, capsys, monkeypatch, SUITE | {"arms": arms, "comparisons": [question]})
    assert "the treatment qad 30 steps and a learning rate that decays: add an arm of 30 steps" in " ".join(
        text.split()
    )
    added = yaml.safe_load(text[text.index("  arms:") :])
    assert added["arms"] == {"bf16_equal": {"training": {"lr_scheduler": "cosine"}}}
    whole = SUITE | {"arms": arms | added["arms"], "comparisons": [question, *added["comparisons"]]}
    assert "unequal budget" not in planned_text(tmp_path, capsys, monkeypatch, whole)


def test_a_plan_of_equal_budgets_or_of_training_itself_asks_for_nothing(tmp_path, capsys, monkeypatch):
    arms = {"bf16": {}, "qad": {"training": {"steps": 60}}}
    question = SUITE["comparisons"][0] | {"treatment": "qad@full", "factors": ["training.steps"]}
    alone = SUITE | {"arms": arms, "comparisons": [question]}
    assert "unequal budget" not in planned_text(tmp_path, capsys, monkeypatch, alone)


@pytest.fixture
def recipe(make_run, tmp_path, monkeypatch):
    """The folder of SUITE with its runs, where qad is 2 points above bf16."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "runs" / "recipe"
    for run in planned(Suite.model_validate(SUITE)):
        rounded = run.arm == "qad"
        mine = {"inputs": {"start model": f"f{run.seed}" if rounded else "b"}, "final_files": f"f{run.seed}"}
        made = make_run(
            run.arm,
            run.seed,
            0.9 + 0.01 * run.seed + 0.02 * rounded,
            suite="recipe",
            spec=run.experiment.model_dump(mode="json", exclude={"seed"}),
            evidence=(QUANTIZED if rounded else UNTOUCHED) | mine,
            profile={} if rounded else FULL,
            device="cpu",
        )
        assert made.run_id == run.run_id
        logged(made, tokens=1e5, cpu_s=2.0, step_s=1.0)
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    return folder


def test_compare_shows_what_both_sides_took_and_the_control_that_is_lacking(recipe, capsys):
    """By hand: 90 and 30 steps of 100,000 tokens, 2 s of CPU and 1 s."""
    assert main(["compare", "recipe", "--runs", str(recipe.parent)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["qad", "90", "180", "9,000,000", "180", "0", "90"] in rows
    assert ["of", "it", "stages", "30", "60", "3,000,000", "60", "0", "30"] in rows
    assert ["bf16", "30", "60", "3,000,000", "60", "0", "30"] in rows
    assert "reaches" in text
    assert "add an arm of 90 steps" in " ".join(text.split())
    assert yaml.safe_load(text[text.index("  arms:") :])["arms"]["bf16_equal"]["training"]["steps"] == 90
    assert main(["compare", "recipe", "--runs", str(recipe.parent), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["verdict"]["word"] == "reaches"
    assert answer["quotable"] is False
    assert answer["equal_control"]["overrides"] == {"training": {"steps": 90, "lr_scheduler": "cosine"}}


def test_a_damaged_run_is_named_and_refused_and_one_that_is_not_there_is_counted(recipe, capsys):
    """Of three planned seeds one is damaged: left out in silence, the others alone gave the verdict."""
    lost, gone = sorted(recipe.glob("qad-s*"))[1:]
    shutil.rmtree(gone)
    words = ["compare", "recipe", "--runs", str(recipe.parent), "--json"]
    assert main(words) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert "; it rests on 2 of the 3 planned runs of qad@deployment; at unequal budget" in answer["verdict"]["why"]
    assert (answer["treatment"]["planned"], answer["control"]["planned"]) == (3, 3)
    (lost / "result.json").write_text("{")
    assert main(words) == 1
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["verdict"] is None
    (objection,) = answer["objections"]
    assert objection["what"].startswith(f"{lost.name} (damaged: ")
    assert "result.json" in objection["what"]


def test_the_report_tells_the_unequal_budget_wherever_it_tells_the_verdict(recipe):
    report = collect(recipe)
    unequal = "at unequal budget: qad took 90 steps with its stages, bf16 took 30 steps"
    assert unequal in headline(report)[0]
    assert unequal in report.questions[0].sentence()
    assert any(note.startswith("Unequal budget: control arm bf16 has 30 steps") for note in report.notes)
    assert [(cost.arm, cost.steps, cost.steps_in_all, cost.tokens) for cost in report.costs] == [
        ("bf16", 90, 30, 9e6),
        ("qad", 180, 90, 18e6),
        ("all", 270, None, 27e6),
    ]
    (check,) = [check for check in checks(report.runs, report.questions) if check.of == "questions"]
    assert (check.passed, check.total, check.others) == (0, 1, "qad@deployment against bf16@full")


def test_show_tells_what_led_to_a_runs_weights(recipe, capsys):
    assert main(["show", "recipe/qad-s1", "--runs", str(recipe.parent), "--json"]) == 0
    took = json.loads(capsys.readouterr().out)["spent"]
    assert (took["own"]["steps"], took["stages"]["steps"], took["own"]["cpu_s"], took["teacher"]) == (
        60,
        30,
        120.0,
        None,
    )
    assert main(["show", "recipe/qad-s1", "--runs", str(recipe.parent)]) == 0
    assert ["training", "90", "180", "9,000,000", "180", "0", "90"] in map(
        str.split, capsys.readouterr().out.splitlines()
    )
