"""`fp4rl health` on logs of ours and of others."""

import json
from pathlib import Path

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.folders import RunFolder
from fp4rl.spec.evidence import Evaluation, Profile
from fp4rl.spec.records import RunResult


@pytest.fixture
def healthy_log(shared_data):
    return str(shared_data / "logs" / "grpo_like_healthy_verl.log")


def run_folder(path, accuracies, evaluations=()):
    run = RunFolder(path / "suite" / "arm-s0-0123456789ab")
    for step, accuracy in enumerate(accuracies, start=1):
        run.add_metrics(step, {"accuracy/rollout": accuracy, "entropy": 0.1})
    if evaluations:
        found = [Evaluation(step=s, strict=a, profile=Profile(name=p)) for s, a, p in evaluations]
        run.write_result(RunResult(evaluations=tuple(found)))
    return str(run.path)


def test_the_public_healthy_log_leaves_with_0_and_shows_every_check(healthy_log, capsys):
    assert main(["health", healthy_log]) == 0
    shown = capsys.readouterr().out
    assert "106 steps (verl)" in shown
    assert "entropy_collapse" in shown
    assert "0.336 -> 0.064" in shown
    words = " ".join(shown.replace("│", " ").split())  # a narrow terminal wraps the cells
    assert "no_spread not judged" in words
    assert "needs reward/no_spread or sampling/dropped_share" in words


def test_a_collapsed_run_leaves_with_1_and_names_the_step(tmp_path, capsys):
    folder = run_folder(tmp_path, [0.4] * 10 + [0.01] * 5)
    assert main(["health", folder]) == 1
    captured = capsys.readouterr()
    assert "accuracy_collapse alarm (since step 11)" in captured.out
    assert captured.err == "fp4rl: an alarm at step 13: accuracy_collapse\n"


def test_json_is_one_document_with_states_and_course(tmp_path, capsys):
    main(["health", run_folder(tmp_path, [0.4] * 10 + [0.01] * 5), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    assert document["checks"][0]["check"] == "accuracy_collapse"
    assert [entry["state"] for entry in document["course"]][-1] == "alarm"


def test_evaluations_of_a_finished_run_are_its_validation(tmp_path, capsys):
    evaluations = [(0, 0.5, "full"), (0, 0.2, "deployment"), (0, 0.9, "w4a4"), (6, 0.3, "deployment")]
    main(["health", run_folder(tmp_path, [0.2] * 5, evaluations), "--json"])
    document = json.loads(capsys.readouterr().out)
    (collapse,) = [c for c in document["checks"] if c["check"] == "accuracy_collapse"]
    assert "validation 0.2 -> 0.3" in collapse["evidence"]


def test_a_rule_of_ones_own_is_applied(healthy_log, capsys):
    assert main(["health", healthy_log, "--rule", "stop if actor/entropy < 0.2 at step 20"]) == 1
    assert "actor/entropy is 0.192" in capsys.readouterr().out


def test_a_rule_that_the_log_never_came_to_is_not_judged(tmp_path, capsys):
    folder = run_folder(tmp_path, [0.4] * 10)
    assert main(["health", folder, "--rule", "stop if accuracy < 0.5 at step 20", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    (rule,) = [check for check in checks if check["check"].startswith("stop if")]
    assert (rule["state"], rule["evidence"]) == ("not judged", "accuracy was not logged from step 20 on")


def test_a_threshold_can_be_set(tmp_path, capsys):
    folder = run_folder(tmp_path, [0.4] * 10 + [0.25] * 5)
    assert main(["health", folder]) == 0
    assert main(["health", folder, "--set", "accuracy_drop=0.3", "--set", "accuracy_points=0.1"]) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rule", "stop when x"], "write it like 'stop if"),
        (["--rule", "stop if actor/entropyy < 0.2"], "no metric 'actor/entropyy'; did you mean 'actor/entropy'?"),
        (["--set", "length_rato=2"], "did you mean 'length_ratio'"),
        (["--set", "length_ratio"], "write it like length_ratio=2"),
    ],
)
def test_a_mistake_leaves_with_2_and_one_line(words, message, healthy_log, capsys):
    assert main(["health", healthy_log, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_log_that_is_not_there_leaves_with_2(tmp_path, capsys):
    assert main(["health", str(tmp_path / "nothing.log")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_log_in_which_nothing_can_be_judged_is_not_called_healthy(tmp_path, capsys):
    run = RunFolder(tmp_path / "suite" / "arm-s0-0123456789ab")
    run.add_metrics(1, {"time/step_s": 1.0})
    assert main(["health", str(run.path)]) == 2
    assert "nothing that a check looks at" in capsys.readouterr().err


def runs_with_a_collapse(path):
    return [run_folder(path / name, [0.4] * 10 + end) for name, end in (("a", [0.4] * 5), ("b", [0.01] * 5))]


def test_a_suite_is_judged_run_by_run_and_leaves_with_1_after_an_alarm_in_any(tmp_path, capsys):
    """What can be named: a suite, the folder of all suites, a run by the beginning of its name."""
    good, bad = runs_with_a_collapse(tmp_path)
    suite = RunFolder(tmp_path / "a" / "suite")
    assert main(["health", str(suite.path)]) == 0
    assert main(["health", str(tmp_path / "b")]) == 1
    captured = capsys.readouterr()
    assert "suite/arm-s0-0123456789ab" in captured.out
    assert captured.err == "fp4rl: 1 of 1 run had an alarm\n"
    assert main(["health", "suite/arm-s0", "--runs", str(tmp_path / "a")]) == 0
    assert main(["health", "suite/arm-s0", "--runs", str(tmp_path / "b")]) == 1
    assert main(["health", "suite/arm-s7", "--runs", str(tmp_path / "b")]) == 2
    assert (good, bad) == (str(suite.path / "arm-s0-0123456789ab"), str(tmp_path / "b/suite/arm-s0-0123456789ab"))


def test_a_suite_with_a_run_that_cannot_be_read_judges_the_others_and_names_it(tmp_path, capsys):
    good, bad = (Path(run) for run in runs_with_a_collapse(tmp_path))
    bad.rename(good.with_name("broken"))
    (good.with_name("broken") / "metrics.jsonl").write_text("\0\0\0")
    assert main(["health", str(good.parent), "--json"]) == 1
    captured = capsys.readouterr()
    runs = {one["run"]: one for one in json.loads(captured.out)["runs"]}
    assert runs["arm-s0-0123456789ab"]["state"] != "unreadable"
    assert runs["broken"]["state"] == "unreadable"
    assert captured.err == "fp4rl: 1 run cannot be read\n"


def test_a_checkpoint_of_trl_is_judged_by_its_state(tmp_path, capsys):
    """A folder as Hugging Face trainers leave it, with the names that TRL logs under."""
    place = tmp_path / "out" / "checkpoint-15"
    place.mkdir(parents=True)
    history = [
        {"step": step, "reward": reward, "rewards/my_own_check/mean": reward, "completion_length": 100.0, "loss": 0.1}
        for step, reward in enumerate([0.4] * 10 + [0.01] * 5, start=1)
    ]
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 15, "log_history": history}))
    for folder in (place, place.parent):
        assert main(["health", str(folder)]) == 1
        captured = capsys.readouterr()
        assert "15 steps (trl)" in " ".join(captured.out.split())  # a long path wraps the line somewhere
        assert "100 -> 100" in captured.out  # length by its older name
        assert captured.err == "fp4rl: an alarm at step 13: accuracy_collapse\n"


def test_a_log_of_two_attempts_is_judged_by_the_later_one_and_says_so(tmp_path, capsys):
    """Steps that go back: the collapse of the earlier attempt is not that of the run."""
    log = tmp_path / "metrics.csv"
    rows = [*enumerate([0.4] * 10 + [0.01] * 5), *((step, 0.4) for step in range(8, 20))]
    log.write_text("step,reward\n" + "".join(f"{step},{reward}\n" for step, reward in rows))
    assert main(["health", str(log), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)["read"]
    assert read == [
        "the steps go back once, from 14 to 8: the later attempt counts",
        "7 numbers were met twice: the later one counts",
    ]
