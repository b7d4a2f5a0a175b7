"""`fp4rl health` on logs of ours and of others."""

import json

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.folders import RunFolder


@pytest.fixture
def healthy_log(shared_data):
    return str(shared_data / "logs" / "grpo_like_healthy_verl.log")


def run_folder(path, accuracies, evaluations=()):
    run = RunFolder(path / "suite" / "arm-s0-0123456789ab")
    for step, accuracy in enumerate(accuracies, start=1):
        run.add_metrics(step, {"accuracy/rollout": accuracy, "entropy": 0.1})
    if evaluations:
        run.write_result({"evaluations": [{"step": s, "strict": a, "profile": {"name": p}} for s, a, p in evaluations]})
    return str(run.path)


def test_the_public_healthy_log_leaves_with_0_and_shows_every_check(healthy_log, capsys):
    assert main(["health", healthy_log]) == 0
    shown = capsys.readouterr().out
    assert "106 steps (verl)" in shown
    assert "entropy_collapse" in shown
    assert "0.336 -> 0.064" in shown
    (spread,) = [line for line in shown.splitlines() if "no_spread" in line]
    assert "not judged" in spread
    assert "needs sampling/dropped_share" in spread


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
