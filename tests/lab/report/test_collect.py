"""Collecting a suite: which runs count, what they scored, and what a reader is told about the rest."""

import json
from pathlib import Path

import pytest
import yaml

from fp4rl.lab.folders import RunFolder
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.evidence import evidence_of
from fp4rl.lab.report.scores import mean_over_seeds
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.experiment import Experiment
from planted.records import line


def score(report, name):
    return next(score for score in report.scores if score.name == name)


def test_a_complete_suite_answers_its_questions(complete):
    assert complete.state == "12 of 12 runs"
    assert [question.word for question in complete.questions] == ["better", "no difference shown", "reaches"]


def test_accuracies_are_points_at_step_0_and_at_the_last_step(complete):
    found = score(complete, "w4a16@deployment")
    assert found.before.value == pytest.approx(33.2)
    assert found.values == pytest.approx((90.3, 92.0, 92.4))
    assert found.problems == 500


def test_the_interval_is_students_over_seeds():
    mean = mean_over_seeds([90.0, 92.0, 94.0])
    # t(0.975, 2 degrees of freedom) = 4.3027; standard error 2 / sqrt(3)
    assert (mean.low, mean.high) == pytest.approx((92 - 4.9683, 92 + 4.9683), abs=1e-3)


@pytest.mark.parametrize("values", [[90.0], [90.0, 90.0, 90.0]])
def test_a_mean_without_measured_chance_has_no_interval(values):
    mean = mean_over_seeds(values)
    assert (mean.value, mean.low, mean.high) == (90.0, None, None)


def test_an_interval_stays_within_0_and_100_points():
    mean = mean_over_seeds([99.0, 91.0])
    assert (mean.low, mean.high) == (pytest.approx(95 - 12.7062 * 4, abs=1e-2), 100.0)


def test_a_missing_run_is_named_and_the_suite_is_partial(make_trial):
    report = collect(make_trial().write(missing=[("w4a4", 2)]))
    assert report.state == "partial: 11 of 12 runs"
    assert "Partial: 11 of 12 runs; planned: w4a4 seed 2." in report.notes
    assert len(score(report, "w4a4@full").values) == 2


def test_a_run_without_a_result_is_not_finished(make_trial):
    report = collect(make_trial().write(unfinished=[("bf16", 0)]))
    assert [run.state for run in report.missing] == ["unfinished"]


def test_a_run_without_evidence_enters_no_mean_and_refuses_its_comparisons(make_trial):
    report = collect(make_trial().write(without_evidence=[("w4a16+aqn", 1)]))
    found = score(report, "w4a16+aqn@deployment")
    assert (len(found.by_seed), len(found.values)) == (3, 2)
    assert [question.word for question in report.questions] == ["better", "not comparable", "reaches"]
    assert "left no evidence" in report.questions[1].sentence()
    assert any(note.startswith("Not comparable") and "w4a16+aqn seed 1" in note for note in report.notes)


def test_an_arm_whose_runs_all_lack_evidence_has_no_mean(make_trial):
    report = collect(make_trial().write(without_evidence=[("w4a4", seed) for seed in range(3)]))
    assert score(report, "w4a4@deployment").after is None


def test_a_run_that_never_compared_its_live_policy_does_not_count(make_trial):
    folder = make_trial().write()
    run = next(folder.glob("bf16-s0-*"))
    lines = (run / "evidence.jsonl").read_text().splitlines(keepends=True)
    (run / "evidence.jsonl").write_text("".join(line for line in lines if "live_equals_fresh" not in line))
    assert "no check of its live policy against the saved one is recorded" in collect(folder).runs[0].gaps


def test_a_number_of_an_earlier_step_is_not_the_last_one(make_trial):
    folder = make_trial().write()
    file = next(folder.glob("bf16-s0-*")) / "result.json"
    result = json.loads(file.read_text())
    for evaluation in result["evaluations"]:
        evaluation["step"] = 8 if evaluation["last"] else 0
    file.write_text(json.dumps(result))
    assert "its last evaluation of full is of step 8, not 12" in collect(folder).runs[0].gaps


def test_a_run_made_by_other_code_is_stale_and_is_not_mixed_with_others(make_trial):
    report = collect(make_trial().write(stale=[("w4a16+aqn", 0)]))
    assert [run.planned.arm for run in report.stale] == ["w4a16+aqn"]
    assert "code" in report.questions[1].sentence()
    assert report.questions[1].word == "not comparable"


def test_a_mean_over_runs_that_were_rounded_differently_is_marked(make_trial):
    """As where a mode means other formats than it did when the first seeds were run."""
    folder = make_trial().write()
    file = next(folder.glob("bf16-s0-*")) / "result.json"
    result = json.loads(file.read_text())
    for evaluation in result["evaluations"]:
        if evaluation["profile"]["name"] == "w4a4":
            evaluation["profile"]["sites_digest"] = "4d2c04c1ea1f"
    file.write_text(json.dumps(result))
    said = "Runs of bf16@w4a4 were rounded differently (site tables 4d2c04c1ea1f, table-w4a4): its mean mixes them."
    assert [note for note in collect(folder).notes if "rounded differently" in note] == [said]


def test_a_suite_made_wholly_by_other_code_is_compared_and_marked(make_trial):
    everything = [(arm, seed) for arm in ("bf16", "w4a16", "w4a16+aqn", "w4a4") for seed in range(3)]
    report = collect(make_trial().write(stale=everything))
    assert report.questions[0].word == "better"
    assert any("all 12 runs" in note for note in report.notes)
    assert not any("rounded differently" in note for note in report.notes)


def test_a_folder_that_the_suite_does_not_ask_for_is_named_and_left_out(make_trial):
    folder = make_trial().write()
    RunFolder(folder / "old-s9-0123456789ab").write_spec("seed: 9\n")
    report = collect(folder)
    assert report.not_planned == ("old-s9-0123456789ab",)
    assert any("1 run folder is not asked for" in note for note in report.notes)
    assert report.state == "12 of 12 runs"


def test_a_folder_without_a_suite_names_the_nearest_one(make_trial):
    folder = make_trial().write()
    with pytest.raises(NotFoundError, match="did you mean 'trial'"):
        collect(folder.with_name("trail"))


@pytest.mark.parametrize("place", [("evaluations", 0, "mean_length"), ("evaluations", 0, "profile"), ("versions",)])
def test_a_result_that_holds_another_sort_of_value_is_damaged(make_trial, place):
    """Kind: JSON that is whole and says something else, which would end in a traceback where it is added up."""
    folder = make_trial().write()
    file = next(folder.glob("w4a4-s1-*")) / "result.json"
    content = json.loads(file.read_text())
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = ["x"]
    file.write_text(json.dumps(content))
    assert len(collect(folder).damages) == 1


def test_a_damaged_result_is_named_and_the_other_runs_are_shown(make_trial):
    folder = make_trial().write()
    run = next(folder.glob("w4a4-s1-*"))
    (run / "result.json").write_text('{"evaluations": [{"step": 1}]}')
    report = collect(folder)
    (damage,) = report.damages
    assert run.name in str(damage)
    assert "strict" in str(damage)
    assert report.state == "partial: 11 of 12 runs"
    assert any(note.startswith("Partial: 11 of 12 runs; damaged: w4a4") for note in report.notes), report.notes


def test_a_single_experiment_is_shown_without_questions(tmp_path: Path):
    described = Experiment().model_dump(mode="json")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(described))
    report = collect(tmp_path)
    assert (report.state, report.questions, list(report.arms)) == ("partial: 0 of 1 run", (), ["run"])


def test_the_report_is_strict_json(make_trial):
    trial = make_trial()
    folder = trial.write(missing=[("w4a4", 2)], without_evidence=[("w4a16", 1)], stale=[("bf16", 0)])
    plain = json.loads(json.dumps(collect(folder).as_dict(), allow_nan=False))
    assert plain["questions"][0]["word"] == "not comparable"
    assert plain["differences_between_arms"]["w4a16+aqn"]["noise"]["first"] is None


def test_with_one_update_a_rollout_the_report_says_that_clip_higher_never_acted(make_trial):
    base = {
        "training": {"steps": 12, "mini_batch_size": 16},
        "evaluation": {"count": 500, "deployment": "compressed_tensors"},
    }
    report = collect(make_trial(base=base, arms={"w4a4": {"injection": "w4a4"}}, comparisons=[]).write())
    assert any("clip-higher never acted" in note for note in report.notes)


def test_the_spread_between_seeds_and_the_start_are_told(complete):
    notes = complete.notes
    assert any("46.0 % (full), 33.2 % (w4a16), 9.8 % (w4a4); 97 % of the answers" in note for note in notes)
    assert any("standard deviation of 1.1" in note for note in notes)


def rewrite(folder, arm, change):
    """Change every result of an arm in place."""
    for file in folder.glob(f"{arm}-s*/result.json"):
        result = json.loads(file.read_text())
        change(result)
        file.write_text(json.dumps(result))


def test_several_answers_to_a_problem_give_pass_at_k_over_seeds(make_trial):
    folder = make_trial().write()

    def sampled(result):
        for evaluation in result["evaluations"]:
            evaluation |= {"n": 2000, "problems": 500, "mean@4": evaluation["strict"], "pass@4": 0.98}

    rewrite(folder, "bf16", sampled)
    found = score(collect(folder), "bf16@full")
    assert (found.problems, found.of_samples["pass@4"].value) == (500, 98.0)


def test_a_measured_kl_is_a_mean_over_seeds_in_nats(make_trial):
    """A KL above 100 is one: it is not cut as a share in percent would be."""
    folder, given = make_trial().write(), iter(range(90, 900, 30))
    seen = []

    def measured(result):
        for evaluation in result["evaluations"]:
            if evaluation["last"] and evaluation["profile"]["name"] == "full":
                seen.append(float(next(given)))
                evaluation |= {"kl": seen[-1], "same_top": 0.5, "kl_tokens": 100}

    rewrite(folder, "bf16", measured)
    found = score(collect(folder), "bf16@full")
    assert max(seen) > 100
    assert found.kl.value == pytest.approx(sum(seen) / len(seen))
    assert score(collect(folder), "w4a4@full").kl is None


def test_a_robustness_sweep_is_judged_at_the_last_step_alone(make_trial):
    evaluation = {"count": 500, "deployment": "compressed_tensors", "profiles": ["full"], "matmul_noise": [0.05]}
    trial = make_trial(base={"training": {"steps": 12}, "evaluation": evaluation}, comparisons=[], arms={"bf16": {}})
    trial.levels["bf16", "matmul_noise=0.05"] = 85.0
    found = score(collect(trial.write()), "bf16@matmul_noise=0.05")
    assert found.before is None
    assert found.after.value == pytest.approx(85.07, abs=0.01)


def test_a_run_that_the_monitor_ended_does_not_count_and_says_why(make_trial):
    folder = make_trial().write()

    def ended(result):
        result |= {"steps_done": 7, "stopped": "step 7: length_explosion alarm"}
        for evaluation in result["evaluations"]:
            evaluation["step"] = 7 if evaluation["last"] else 0

    rewrite(folder, "w4a4", ended)
    report = collect(folder)
    assert score(report, "w4a4@full").after is None
    assert any("Ended early by the monitor: w4a4 seed 0 (step 7" in note for note in report.notes)


def test_a_run_that_was_rolled_back_is_named(make_trial):
    folder = make_trial().write()
    alarm = {"check": "gradient", "state": "alarm", "step": 4, "since": 3, "evidence": "1e9", "policy": "rollback"}
    health = {"state": "alarm", "alarms": [alarm], "rollbacks": 1}
    rewrite(folder, "w4a4", lambda result: result["evidence"].update(health=health))
    report = collect(folder)
    assert any("lower learning rate: w4a4 seed 0, w4a4 seed 1" in note for note in report.notes)
    rows = dict(evidence_of(report.runs, "w4a4").rows)
    assert rows["monitor"][0] == "alarm; gradient at step 4; rolled back 1 x, at a lower learning rate"


def test_what_runs_said_aloud_and_what_was_known_beforehand_stands_in_the_notes(make_trial):
    """Kind: warnings that stand in a log alone; a line of several runs is said once, whatever its numbers."""
    trial = make_trial(arms={"bf16": {"evaluation": {"temperature": 0.5, "profiles": ["full"]}}}, comparisons=[])
    folder = trial.write()
    for seed, share in ((0, "0.43"), (2, "0.51")):
        run = RunFolder(next(folder.glob(f"bf16-s{seed}-*")))
        run.add_evidence(line("warning", line=f"training changed {share} % of the weights"))
        run.add_evidence(line("warning", line=f"training changed {share} % of the weights"))
    found = collect(folder).notes
    assert "Warning of bf16 seed 0: training changed 0.43 % of the weights; similar in bf16 seed 2." in found
    (known,) = [note for note in found if note.startswith("Known beforehand: evaluation.temperature")]
    assert "evaluation.temperature 0.5 cannot act: evaluation.samples is 1" in known


def test_the_report_refuses_what_compare_refuses_by_value(make_trial):
    """Kind: two names for one thing; the digests of weights are looked at in both."""
    folder = make_trial().write()
    for arm in ("w4a16", "w4a16+aqn"):
        for file in folder.glob(f"{arm}-s*/result.json"):
            result = json.loads(file.read_text())
            result["evidence"]["final_weights"] = f"w{result['seed']}"
            file.write_text(json.dumps(result))
    question = collect(folder).questions[1]
    assert question.word == "not comparable"
    assert question.sentence() == (
        "Not comparable: the final weights are bit-identical (seed 0, 1, 2): what differs did not act (digest w0)."
    )
