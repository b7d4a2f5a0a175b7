"""What the page shows besides answers and scores: flips, rollouts, cost, traps, ranking; and its other forms."""

import csv
import json
from io import StringIO

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import planned
from fp4rl.lab.report.checks import checks
from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.exports import markdown, table_csv
from fp4rl.lab.report.flips import MOST_SHOWN
from fp4rl.lab.report.headline import headline, ranking
from fp4rl.lab.report.html import render
from fp4rl.lab.report.rollouts import MOST_STEPS, MOST_TEXT, spread

STEP = 12


def answer(problem, solved, text="#### 1"):
    flags = {"strict": solved, "flexible": solved, "formatted": True, "truncated": False}
    return {"problem_id": problem, "sample": 0, "completion": text, "length": 3} | flags


def give_answers(trial, by_seed):
    """Store the answers of both sides of the first question; `by_seed(arm, seed)` -> rows."""
    for run in planned(trial.suite):
        profile = {"w4a16": "deployment", "bf16": "w4a16"}.get(run.arm)
        if profile:
            RunFolder(trial.folder / run.run_id).write_items(STEP, profile, by_seed(run.arm, run.seed))


def test_flips_are_counted_by_hand(make_trial):
    """Three seeds. p0: 3 of 3 against 0; p1: 1 against 2; p2: all equal; p3: 0 against 3."""
    solved = {
        "w4a16": [(1, 1, 1), (1, 0, 0), (1, 1, 1), (0, 0, 0)],
        "bf16": [(0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 1)],
    }
    trial = make_trial()
    trial.write()
    give_answers(
        trial, lambda arm, seed: [answer(f"p{n}", bool(own[seed]), f"{arm} {n}") for n, own in enumerate(solved[arm])]
    )
    first, *others = collect(trial.folder).flips
    assert (first.gained, first.lost, first.problems, first.runs) == (1, 2, 4, (3, 3))
    assert [(flip.problem_id, flip.solved) for flip in first.shown] == [("p0", (3, 0)), ("p3", (0, 3)), ("p1", (1, 2))]
    assert first.shown[0].answers == (("w4a16 0", True), ("bf16 0", False))
    assert first.shown[2].answers == (("w4a16 1", True), ("bf16 1", True))  # right here, and lost over the seeds
    assert [own.why for own in others] == ["a side has no stored answers here"] * 2


def test_of_many_flips_the_largest_of_both_directions_are_shown(make_trial):
    trial = make_trial()
    trial.write()
    give_answers(trial, lambda arm, seed: [answer(f"p{n}", (arm == "bf16") == (n < 40)) for n in range(100)])
    first = collect(trial.folder).flips[0]
    assert (first.gained, first.lost, len(first.shown)) == (60, 40, MOST_SHOWN)
    assert sum(flip.solved == (0, 3) for flip in first.shown) == MOST_SHOWN // 2


def test_rollouts_are_of_the_first_run_that_kept_some_and_what_is_too_much_is_left_out(make_trial):
    trial = make_trial()
    trial.write()
    runs = [run for run in planned(trial.suite) if run.arm == "w4a4"]
    for step in range(1, 101):
        RunFolder(trial.folder / runs[1].run_id).add_rollouts(
            step, [{"completion": "x" * 3000, "reward": float("nan")}] * 9
        )
    (own,) = collect(trial.folder).rollouts
    assert (own.arm, own.seed, own.steps) == ("w4a4", runs[1].seed, 100)
    assert len(own.by_step) == MOST_STEPS
    assert {1, 100} <= set(own.by_step)
    assert own.by_step[1][0]["completion"].startswith("x" * MOST_TEXT + " [")
    assert len(own.by_step[1]) == 4
    json.dumps([dict(step) for step in own.by_step[1]], allow_nan=False)


def test_steps_are_spread_evenly_with_both_ends():
    assert spread(range(1, 101), 4) == [1, 34, 67, 100]
    assert spread([3, 5], 4) == [3, 5]


def test_the_cost_of_an_arm_is_the_sum_of_its_runs(make_trial):
    """Twelve runs of 21.5 s and 12 steps; each step of one logs 10 answers in 2 of 6 groups, 30 in all, and tokens."""
    trial = make_trial()
    trial.write()
    run = next(run for run in planned(trial.suite) if run.arm == "w4a4")
    logged = {"rollout/answers": 10.0, "rollout/groups": 2.0, "sampling/generated_groups": 6.0, "time/step_s": 4.0}
    for step in range(1, STEP + 1):
        RunFolder(trial.folder / run.run_id).add_metrics(step, logged | {"tokens/rollout": 600.0})
    by_arm = {cost.arm: cost for cost in collect(trial.folder).costs}
    assert (by_arm["w4a4"].answers, by_arm["w4a4"].tokens, by_arm["w4a4"].training_s) == (12 * 30, None, 48.0)
    assert (by_arm["bf16"].runs, by_arm["bf16"].steps, by_arm["bf16"].wall_s) == (3, 36, pytest.approx(64.5))
    assert (by_arm["all"].runs, by_arm["all"].tokens, by_arm["all"].cpu_s) == (12, None, None)


def test_the_table_of_traps_names_the_runs_that_do_not_pass(make_trial):
    trial = make_trial()
    report = collect(trial.write(without_evidence=[("w4a16", 1)], stale=[("w4a4", 0)]))
    rows = {check.trap: check for check in checks(report.runs, report.questions)}
    acted = rows["The treatment was described and never acted"]
    assert (acted.passed, acted.total, acted.others) == (11, 12, "w4a16 seed 1")
    assert rows["Runs of different code are compared"].others == "w4a4 seed 0"
    noise = next(check for trap, check in rows.items() if "swallowed" in trap)
    assert (noise.passed, noise.total) == (3, 3)


def test_the_ranking_orders_by_mean_and_pairs_the_cost_of_a_format_by_seed(complete):
    rows = ranking(complete.scores)
    assert [row.score.name for row in rows[:2]] == ["w4a16@full", "bf16@full"]
    assert rows[0].score.after.value > rows[1].score.after.value
    deployed = next(row for row in rows if row.score.name == "w4a16@deployment")
    assert deployed.cost.value == pytest.approx(-1.0)  # 91.5 against 92.5, with the same spread of seeds
    assert not next(row for row in rows if row.score.name == "bf16@w4a4").within


def test_the_verdict_says_each_question_and_what_it_rests_on(complete):
    sentences = headline(complete)
    assert "is better, by more than chance in training explains (+10.5 points)" in sentences[0]
    assert "not proof that there is none" in sentences[1]
    assert sentences[-1] == "This rests on 12 runs that prove their treatment (12 done)."


def test_markdown_holds_what_the_page_says_and_no_markup_of_its_words(make_trial):
    comparison = {"question": "<img src=x>|[a](b)", "treatment": "w4a4@full", "control": "bf16@full"}
    text = markdown(collect(make_trial(comparisons=[comparison]).write()))
    assert "| 1 | w4a16@full | 92.6" in text
    assert "<img" not in text
    assert "&lt;img src=x>\\|\\[a](b)" in text


def test_csv_has_a_line_for_each_evaluation_and_each_run_without_one(make_trial):
    report = collect(make_trial().write(missing=[("w4a4", 2)]))
    rows = list(csv.DictReader(StringIO(table_csv(report))))
    assert len(rows) == 3 * 6 + 3 * 4 + 3 * 4 + 2 * 4 + 1
    last = [row for row in rows if (row["arm"], row["profile"], row["last"]) == ("w4a16", "deployment", "True")]
    assert [float(row["strict"]) for row in last] == pytest.approx([0.903, 0.920, 0.924])
    assert [row["status"] for row in rows if not row["step"]] == ["planned"]


@pytest.mark.parametrize("form", ["md", "csv"])
def test_the_verb_writes_the_form_that_is_asked_for(make_trial, capsys, form):
    folder = make_trial().write()
    assert main(["report", str(folder), "--format", form]) == 0
    assert str(folder / f"report.{form}") in capsys.readouterr().out.replace("\n", "")
    assert (folder / f"report.{form}").read_text(encoding="utf-8")
    assert not (folder / "report.html").exists()


def test_the_best_of_each_category_is_of_runs_that_count_and_reported_ones_stand_apart(make_trial, capsys):
    """w4a16+aqn (91.0) and w4a16 (91.5) are one category; w4a4's runs left no evidence, so its 62 % are nothing."""
    trial = make_trial()
    trial.write(without_evidence=[("w4a4", seed) for seed in range(3)])
    assert main(["report", "--best", "--runs", str(trial.folder.parent), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    own = {(row["trained_under"], row["measured_under"]): row for row in told["own"]}
    assert own["w4a16", "w4a16"]["name"] == "trial/w4a16@deployment"
    assert own["w4a16", "w4a16"]["of"] == 2
    assert not [key for key in own if key[0] == "w4a4"]
    reported = {(row["model"], row["category"]): row for row in told["reported"]}
    small = "Qwen2.5-1.5B-Instruct"
    assert reported[small, "BF16"]["accuracy"] >= 75.97  # the baseline's own number
    assert reported[small, "MXFP4 W4A16"]["of"] > 1


def test_best_is_printed_within_the_width(make_trial, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trial = make_trial()
    trial.write()
    assert main(["report", "--best", "--runs", str(trial.folder.parent)]) == 0
    printed = capsys.readouterr().out
    assert "reported elsewhere" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_neither_a_suite_nor_best_is_one_line(capsys):
    assert main(["report"]) == 2
    assert "ask for --best" in capsys.readouterr().err


def test_what_was_expected_stands_on_the_page_with_its_band(make_trial):
    bands = {"of": "w4a16@deployment", "bands": {"pass": 90.0, "fail": None}}
    bands["next"] = {"pass": {"do": ["e13h"], "why": "it <i>holds</i>"}}
    trial = make_trial(criteria=[bands], prediction="It holds.")
    report = collect(trial.write())
    page = render(report)
    assert "<b>Predicted:</b> It holds." in page
    assert "e13h: it &lt;i&gt;holds&lt;/i&gt;" in page
    assert report.as_dict()["bands"][0]["band"] == "pass"


def test_many_runs_leave_out_those_that_passed_and_say_so(make_trial):
    trial = make_trial(seeds=list(range(9)))
    page = render(collect(trial.write(without_evidence=[("w4a4", 8)])))
    assert "6 of 9 runs, those without evidence first" in page
    evidence = page[page.index("<h3>w4a4</h3>") :]
    assert evidence.index("<th>seed 8</th>") < evidence.index("<th>seed 0</th>")
