"""The ledger's verbs on the command line: what a reader sees, what a program reads, and how mistakes end."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from fp4rl.cli.main import main
from fp4rl.lab.folders import RunFolder
from planted.records import line

QUANTIZED = {"sites": 14, "calls": {"training": 9, "rollout": 9}, "master_unharmed": True}
W4A4 = {"injection": {"mode": "w4a4", "weight": "mxfp4", "input": "mxfp4"}}


@pytest.fixture
def root(make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two arms of three seeds, in the suite `trial`, which declared its comparison; seen at 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    for seed in range(3):
        flags = [True] * (30 + seed) + [False] * (10 - seed)
        make_run("bf16", seed, flags, evidence={"sites": 0, "master_unharmed": True})
        make_run("w4a4", seed, flags[10:] + [False] * 10, spec=W4A4, evidence=QUANTIZED)
    sides = {"treatment": "w4a4@deployment", "control": "bf16@deployment", "factors": ["injection"]}
    asked = {"question": "Does W4A4 cost accuracy?", "test": "differs", "margin": None} | sides
    (tmp_path / "runs" / "trial" / "suite.yaml").write_text(yaml.safe_dump({"comparisons": [asked]}))
    return str(tmp_path / "runs")


def read(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_a_measured_kl_is_shown_by_runs_and_show(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    scores = {"n": 40, "flexible": 0.5, "formatted": 1.0, "mean_length": 20.0, "step": 30, "last": True, "strict": 0.5}
    measured = {"kl": 0.01234, "same_top": 0.97, "kl_tokens": 800}
    profiles = {"full": {}, "deployment": measured}
    make_run(evaluations=[scores | {"profile": {"name": name}} | more for name, more in profiles.items()])
    root = str(tmp_path / "runs")
    assert main(["runs", "--runs", root, "--json"]) == 0
    (row,) = read(capsys)
    assert row["kl"] == {"deployment": 0.01234}
    assert main(["runs", "--runs", root]) == 0
    assert "deployment 50.0 (KL 0.01234)" in capsys.readouterr().out
    assert main(["show", row["run_id"], "--runs", root]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0.0123" in out
    assert "KL(unrounded || rounded), nats a token" in out


def test_runs_lists_what_is_finished_and_filters(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["runs", "--runs", root, "--json"]) == 0
    rows = read(capsys)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, s) for arm in ("bf16", "w4a4") for s in range(3)]
    assert rows[0]["strict"] == {"deployment": 0.75}
    assert not rows[0]["imported"]
    assert main(["runs", "--runs", root, "--arm", "w4a4", "--seed", "2", "--json"]) == 0
    assert [row["arm"] for row in read(capsys)] == ["w4a4"]
    assert main(["runs", "--runs", root, "--limit", "2"]) == 0
    assert "4 more; --limit 0 shows all" in capsys.readouterr().out


def test_runs_of_a_profile_are_counted_and_an_unknown_one_is_a_mistake(root: str, make_run, capsys):
    make_run("full", 0, 0.5, profile={"name": "full"})
    assert main(["runs", "--runs", root, "--profile", "full"]) == 0
    shown = capsys.readouterr().out
    assert "1 finished run " in shown
    assert "more" not in shown
    assert main(["runs", "--runs", root, "--profile", "ful"]) == 2
    assert "no run was evaluated as 'ful'; did you mean 'full'" in capsys.readouterr().err


def test_a_factor_that_is_no_key_is_a_mistake(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "w4a4", "bf16", "--factor", "injektion", "--runs", root]) == 2
    assert "'injektion' is no key; did you mean 'injection'" in capsys.readouterr().err


def test_a_question_that_no_suite_declared_is_called_exploratory(root: str, capsys: pytest.CaptureFixture[str]):
    other = ["--factor", "injection", "--factor", "training"]
    assert main(["compare", "w4a4", "bf16", *other, "--runs", root]) == 0
    assert "exploratory" in capsys.readouterr().out
    assert main(["compare", "trial", "--runs", root]) == 0
    assert "exploratory" not in capsys.readouterr().out


def test_a_comparison_by_the_suites_own_factor_is_the_suites(root: str, capsys: pytest.CaptureFixture[str]):
    """Kind: two pipelines for one question; the same factor on the command line refused what the suite answers."""
    sides = ["w4a4@deployment", "bf16@deployment"]
    assert main(["compare", "trial", "--json", "--runs", root]) == 0
    (of_the_suite,) = read(capsys)
    assert main(["compare", *sides, "--factor", "injection", "--json", "--runs", root]) == 0
    assert read(capsys) == [of_the_suite]


def test_precisions_may_differ_where_a_factor_named_by_hand_says_so(root: str, make_run, capsys):
    for seed in range(3):
        change = {"precision": f"w8a{8}", "sites_digest": "bbbb"}
        make_run("w8a8", seed, 0.7 + 0.01 * seed, spec=W4A4 | {"task": {"seed": 1}}, profile=change, evidence=QUANTIZED)
    asked = ["w8a8@deployment", "bf16@deployment", "--factor", "injection", "--factor", "task", "--runs", root]
    assert main(["compare", *asked]) == 0
    assert "(deployment: w8a8)" in capsys.readouterr().out


def test_one_label_over_two_site_tables_is_told_apart(root: str, make_run, capsys):
    """Kind: two arms under one label that were measured under different things."""
    for seed in range(3):
        profile = {"sites_digest": "bbbb"}
        make_run(
            "vllm", seed, 0.5 + 0.01 * seed, spec=W4A4 | {"task": {"seed": 1}}, profile=profile, evidence=QUANTIZED
        )
    asked = ["vllm@deployment", "w4a4@deployment", "--factor", "injection", "--factor", "task", "--runs", root]
    assert main(["compare", *asked]) == 0
    shown = capsys.readouterr().out
    assert "(deployment: w4a4, site table bbbb)" in shown
    assert "(deployment: w4a4, site table aaaa)" in shown


def test_show_keeps_numbers_whole_and_leaves_times_out(root: str, make_run, capsys, monkeypatch):
    run = make_run("long", 0, 0.5)
    name = "a/rather/long/name/of/a/metric/that/must/go/on/below"
    run.add_metrics(0, {name: -1.2345e-17, "time/all": 3.0})
    run.add_evidence(line("warning", line="none of the 4 groups of answers has any spread"))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["show", "long-s0", "--runs", root]) == 0
    shown = capsys.readouterr().out
    assert shown.count("-1.234e-17") + shown.count("-1.235e-17") == 4
    assert max(map(len, shown.splitlines())) <= 80
    assert "time/" not in shown
    assert "1 of time" in shown
    assert "warning: none of the 4 groups" in shown


def test_a_filter_that_takes_nothing_says_so(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["runs", "--runs", root, "--suite", "nothing"]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for verb in (["runs"], ["show", "x"], ["compare", "a", "b"]):
        assert main([*verb, "--runs", str(tmp_path / "no")]) == 2
        assert "no folder of runs here; name it with --runs" in capsys.readouterr().err


def test_show_tells_everything_about_a_run(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "w4a4-s0", "--runs", root]) == 0
    text = capsys.readouterr().out
    for part in (
        "50.0 [35.2, 64.8]",
        "w4a4",
        "reward/mean",
        "injection: 4 lines",
        "items/30-deployment.parquet",
        "lr: 0.0004",
    ):
        assert part in text
    assert main(["show", "w4a4-s0", "--runs", root, "--json"]) == 0
    found = read(capsys)
    assert found["items"] == [{"step": 30, "profile": "deployment", "answers": 40, "solved": 20}]
    assert found["metrics"]["grad_norm"]["last"] is None


def test_show_finds_the_answers_to_one_problem(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "w4a4-s0", "--problem", "p0003", "--runs", root, "--json"]) == 0
    (answer,) = read(capsys)["answers"]
    assert (answer["strict"], answer["length"], answer["completion"]) == (True, 4, "#### 3")
    assert main(["show", "w4a4-s0", "--problem", "p9", "--runs", root]) == 2
    fourth = parquet.read_table(next(Path(root).glob("trial/w4a4-s0-*/items/*.parquet")))["problem_id"][3].as_py()
    assert main(["show", "w4a4-s0", "--problem", "4", "--runs", root]) == 0
    shown = capsys.readouterr().out
    assert f"on {fourth}" in shown
    assert "its task has no such problem any more" in shown
    for number in ("0", "41"):
        assert main(["show", "w4a4-s0", "--problem", number, "--runs", root]) == 2
        assert "numbered 1 to 40" in capsys.readouterr().err


def test_show_prints_question_and_gold_and_lists_what_was_not_solved(make_run, capsys, tmp_path):
    """The oracle: the task itself, whose ids derive from its questions."""
    from fp4rl.tasks.arithmetic import Arithmetic

    problems = Arithmetic().problems("test", 40)
    folder = make_run("bf16", 0, [number % 2 == 0 for number in range(40)], spec={"evaluation": {"count": 40}})
    file = folder.path / "items" / "30-deployment.parquet"
    stored = parquet.read_table(file).to_pylist()
    rows = [
        row | {"problem_id": problem.id, "strict": number % 2 == 0}
        for number, (row, problem) in enumerate(zip(stored, problems, strict=True))
    ]
    folder.write_items(30, "deployment", rows)
    words = ["show", "bf16-s0", "--runs", str(tmp_path / "runs")]
    assert main([*words, "--problem", "2", "--json"]) == 0
    told = read(capsys)
    asked = problems[1]
    assert told["problem"] == {
        "id": asked.id,
        "split": "test",
        "prompt": asked.prompt,
        "answer": asked.answer,
        "solution": asked.solution,
    }
    assert main([*words, "--problem", asked.id]) == 0
    shown = capsys.readouterr().out
    assert repr(asked.prompt) in shown
    assert f"gold  {asked.answer!r}" in shown
    assert main([*words, "--failures", "--json"]) == 0
    (listed,) = read(capsys)["failures"]
    assert [each["problem_id"] for each in listed["unsolved"]] == [problem.id for problem in problems[1::2]]
    assert [each["number"] for each in listed["unsolved"]] == list(range(2, 41, 2))
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "20 of 40 problems not solved" in shown
    assert "and 8 more (--failures)" in shown


@pytest.fixture
def failed_run(root: str) -> RunFolder:
    """A run like w4a4-s0 that failed after its second step, with items of step 30 and a log."""
    path = next(Path(root).glob("trial/w4a4-s0-*"))
    (path / "result.json").unlink()
    folder = RunFolder(path)
    folder.add_evidence(line("failed", why="the loss is not finite"))
    folder.add_evidence(line("warning", line="none of the 4 groups has any spread"))
    (path / "log.txt").write_text("".join(f"line {number}\n" for number in range(40)))
    return folder


def test_show_of_a_failed_run_gives_the_reason_first_and_then_all_that_is_there(root, failed_run, capsys):
    assert main(["show", "w4a4-s0", "--runs", root]) == 1
    said = capsys.readouterr()
    assert f"fp4rl: {failed_run.key} failed: the loss is not finite" in said.err
    first, *rest = said.out.splitlines()
    assert first == f"{failed_run.key}  failed: the loss is not finite"
    out = " ".join(" ".join(rest).split())
    for part in (
        "arm w4a4, seed 0; steps done: 3 of 30",
        "starts it from the beginning: it has no checkpoint yet",
        "none of the 4 groups has any spread",
        "reward/mean 3 0 0.2 0 0.2",
        f"{failed_run.path}/log.txt, its last lines: line 32 line 33",
        "line 39",
        "lr: 0.0004",
        "20 of 40 problems not solved",
    ):
        assert part in out
    assert "line 31" not in out
    assert main(["show", "w4a4-s0", "--runs", root, "--json"]) == 1
    told = read(capsys)
    assert (told["run"]["status"], told["run"]["why"]) == ("failed", "the loss is not finite")
    assert (told["run"]["steps_done"], told["run"]["steps_asked"]) == (3, 30)
    assert told["spec"]["training"]["lr"] == 4e-4


def test_show_of_a_failed_run_has_its_problems_too(root, failed_run, capsys):
    assert main(["show", "w4a4-s0", "--problem", "p0003", "--runs", root, "--json"]) == 1
    told = read(capsys)
    assert [answer["completion"] for answer in told["answers"]] == ["#### 3"]
    assert told["run"]["run_id"] == failed_run.run_id
    assert main(["show", "w4a4-s0", "--failures", "--runs", root, "--json"]) == 1
    assert len(read(capsys)["failures"][0]["unsolved"]) == 20


def test_show_of_a_run_that_was_lost_says_so_and_ends_well(root, failed_run, capsys):
    (failed_run.path / "evidence.jsonl").unlink()
    assert main(["show", "w4a4-s0", "--runs", root]) == 0
    assert capsys.readouterr().out.startswith(f"{failed_run.key}  lost: it left no sign of life")


def test_a_description_is_broken_at_its_keys_alone_and_is_the_same_yaml(root, make_run, capsys, monkeypatch):
    task = {"prompt": "Q: {question}\nA:", "filter": {"a long key": ["a long value", "and another long value"] * 2}}
    run = make_run("long", 0, 0.5, spec={"task": task})
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["show", "long-s0", "--runs", root]) == 0
    _, _, text = capsys.readouterr().out.partition("described as\n")
    lines = [each for each in text.splitlines() if each.startswith("  ")]
    spec = {key: value for key, value in run.spec().items() if value is not None and key != "seed"}
    assert yaml.safe_load("\n".join(lines)) == spec


def test_show_names_the_nearest_run(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", "w4a5-s0-", "--runs", root]) == 2
    assert "did you mean" in capsys.readouterr().err or "lists all 6" in capsys.readouterr().err
    assert main(["show", "w4", "--runs", root]) == 2
    assert "3 runs begin with 'w4'" in capsys.readouterr().err


def test_compare_prints_the_verdict_with_interval_and_seeds(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "w4a4", "bf16", "--factor", "injection", "--runs", root]) == 0
    text = capsys.readouterr().out
    assert "-25.0 points [-30.7, -19.3], 3 vs 3 seeds" in text
    assert "worse" in text
    assert "Multi-Bootstrap" in text


def test_a_long_line_of_a_comparison_wraps_below_itself(root: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["compare", "w4a4", "bf16", "--runs", root]) == 0
    first, *rest = capsys.readouterr().out.rstrip().splitlines()
    assert not first.startswith(" ")
    assert len(rest) > 6
    assert all(line.startswith("  ") for line in rest)


def test_run_ids_and_names_of_profiles_stay_whole_on_80_columns(root: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs", "--runs", root, "--json"]) == 0
    ids = [row["run_id"] for row in read(capsys)]
    assert main(["runs", "--runs", root]) == 0
    listed = capsys.readouterr().out
    assert all(run in listed for run in ids)
    assert main(["show", "w4a4-s0", "--runs", root]) == 0
    assert " deployment: " in capsys.readouterr().out


def test_compare_answers_what_the_suite_declared(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "trial", "--runs", root]) == 0
    assert "Does W4A4 cost accuracy?" in capsys.readouterr().out


def test_compare_of_two_sides_keeps_to_what_was_declared_about_them(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "w4a4", "bf16", "--runs", root]) == 0
    assert "Does W4A4 cost accuracy?" in capsys.readouterr().out
    assert main(["compare", "bf16", "w4a4", "--runs", root]) == 0
    assert "bf16 against w4a4" in capsys.readouterr().out


def test_one_question_of_a_suite_gets_the_verdict_that_it_has_among_all(root, make_run, capsys):
    for seed in range(3):
        make_run("w4a16", seed, 0.7 + 0.01 * seed, spec=W4A4, evidence=QUANTIZED)
    file = Path(root) / "trial" / "suite.yaml"
    first = yaml.safe_load(file.read_text())["comparisons"][0]
    second = first | {"question": "W4A16?", "treatment": "w4a16@deployment"}
    never_run = first | {"question": "W8A8?", "treatment": "w8a8@deployment"}
    file.write_text(yaml.safe_dump({"comparisons": [first, second, never_run]}))
    assert main(["compare", "w4a4@deployment", "bf16@deployment", "--runs", root, "--json"]) == 0
    (alone,) = read(capsys)
    assert alone["question"]["label"] == "Does W4A4 cost accuracy?"
    assert alone["verdict"]["comparisons"] == 3
    assert alone["verdict"]["p_family"] == pytest.approx(min(1.0, 3 * alone["verdict"]["p"]))


def test_a_suite_that_declares_nothing_asks_for_two_sides(root: str, capsys: pytest.CaptureFixture[str]):
    Path(root, "trial", "suite.yaml").write_text("suite: trial\n")
    assert main(["compare", "trial", "--runs", root]) == 2
    assert "declares no comparisons; name two sides" in capsys.readouterr().err
    Path(root, "trial", "suite.yaml").unlink()
    assert main(["compare", "trial", "--runs", root]) == 2
    assert "no such file" in capsys.readouterr().err


def test_compare_refuses_with_exit_code_1_and_prints_the_difference(make_run, root: str, capsys):
    make_run("odd", 0, 0.5, spec=W4A4 | {"training": {"lr": 1e-3}}, evidence=QUANTIZED)
    assert main(["compare", "odd", "bf16", "--factor", "injection", "--runs", root]) == 1
    printed = capsys.readouterr()
    assert "the specs also differ in training.lr: 0.001 against 0.0004" in printed.out
    assert "--force" in printed.err
    assert "points" not in printed.out


def test_compare_anyway_labels_what_it_shows(make_run, root: str, capsys: pytest.CaptureFixture[str]):
    make_run("odd", 0, 0.5, spec=W4A4 | {"training": {"lr": 1e-3}}, evidence=QUANTIZED)
    assert main(["compare", "odd", "bf16", "--factor", "injection", "--force", "--runs", root]) == 0
    text = capsys.readouterr().out
    assert "not comparable" in text
    assert "no verdict" in text
    assert main(["compare", "odd", "bf16", "--force", "--runs", root, "--json"]) == 0
    (answer,) = read(capsys)
    assert not answer["comparable"]
    assert answer["verdict"]["word"] is None


def test_power_answers_how_many_seeds(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["power", "2.5", "--spread", "1.57", "--json"]) == 0
    found = read(capsys)
    assert found["seeds_needed"] == 8
    assert 0.75 < found["power"]["7"] < 0.8
    assert main(["power", "2.5", "--runs", root, "--json"]) == 0
    found = read(capsys)
    assert found["spread"] == pytest.approx(2.5)
    assert found["spread_from"].startswith("arithmetic on embedded, 2 groups of repeats")


def test_power_without_repeats_asks_for_the_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "runs").mkdir()
    assert main(["power", "2.5", "--runs", str(tmp_path / "runs")]) == 2
    assert "give --spread" in capsys.readouterr().err


def test_a_log_is_imported_listed_and_shown(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log, root = str(shared_data / "logs" / "grpo_like_healthy_verl.log"), str(tmp_path / "runs")
    assert main(["runs", "import", log, "--arm", "gpg", "--seed", "1", "--runs", root]) == 0
    assert "106 steps (0 to 105), 53 keys" in capsys.readouterr().out
    assert main(["runs", "--runs", root, "--json"]) == 0
    (row,) = read(capsys)
    assert row["imported"]
    assert row["strict"] == {"val-core-openai-gsm8k-reward-mean-1": 0.88}
    assert main(["show", "gpg", "--runs", root]) == 0
    text = capsys.readouterr().out
    assert "actor/entropy" in text
    assert "foreign log without evidence" in text


def test_an_imported_log_takes_a_configuration_a_status_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What a log does not say of itself; a mistake in it is one line, and what was said once is not replaced."""
    log, config, root = tmp_path / "a.jsonl", tmp_path / "config.yaml", str(tmp_path / "runs")
    log.write_text('{"step": 1, "data": {"critic/score/mean": 0.5}}\n')
    config.write_text("actor: {lr: 1.0e-6}\nstarted: 2026-01-02\n")
    words = ["runs", "import", str(log), "--runs", root]
    said = ["--config", str(config), "--status", "failed", "--note", "out of memory [3]"]
    assert main([*words, "--status", "faild"]) == 2
    assert "did you mean 'failed'" in capsys.readouterr().err
    assert main([*words, *said]) == 0
    assert main([*words, *said, "--json"]) == 0
    capsys.readouterr()
    assert main(["show", "imported/a", "--runs", root]) == 0
    text = capsys.readouterr().out
    assert "from a.jsonl (json); failed; out of memory [3]" in text
    assert "lr: 1.0e-06" in text
    assert main(["show", "imported/a", "--runs", root, "--json"]) == 0
    kept = read(capsys)["run"]["imported"]
    assert kept["config"] == {"actor": {"lr": 1e-6}, "started": "2026-01-02"}
    assert (kept["status"], kept["note"]) == ("failed", "out of memory [3]")
    assert main(["runs", "--runs", root]) == 0
    assert "foreign, failed" in capsys.readouterr().out
    assert main([*words, "--note", "another"]) == 2
    assert "is here already with another note" in capsys.readouterr().err


def test_importing_something_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.log").write_text("hello\n")
    assert main(["runs", "import", str(tmp_path / "x.log"), "--runs", str(tmp_path / "runs")]) == 2
    assert "known are verl logs" in capsys.readouterr().err


def test_the_ledger_is_made_again_from_the_folders(root: str, capsys: pytest.CaptureFixture[str]):
    assert main(["ledger", "rebuild", "--runs", root]) == 0
    assert "6 runs recorded in sqlite" in capsys.readouterr().out
    assert main(["ledger", "info", "--runs", root, "--json"]) == 0
    assert read(capsys)["rows"]["documents"] == 6


def test_a_broken_ledger_file_is_one_line(root: str, capsys: pytest.CaptureFixture[str]):
    Path(root, "ledger.db").write_text("this is no database, but it is longer than a header of one hundred bytes " * 3)
    assert main(["runs", "--runs", root]) == 2
    assert "fp4rl ledger rebuild" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", [["runs"], ["show", "w4a4-s0"], ["compare", "trial"], ["power", "5", "--spread", "2"]])
def test_nothing_is_wider_than_the_terminal(root: str, verb: list[str], width: int, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    place = ["--runs", root] if verb[0] != "power" else []
    assert main([*verb, *place]) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).splitlines()
    assert lines
    assert max(len(line) for line in lines) <= width


def test_help_shows_an_example_without_importing_torch_or_scipy():
    code = """
import sys
from fp4rl.cli.main import main
for verb in ("runs", "show", "compare", "audit", "power", "ledger", "deployments"):
    main([*([verb, "rebuild"] if verb == "ledger" else [verb]), "--help"])
print([name for name in ("torch", "scipy", "sqlalchemy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert done.stdout.count("Example") == 7
