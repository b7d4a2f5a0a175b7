"""The verbs on real work, as small as it gets: two steps on GSM8K, and judging a model folder."""

import json

import pytest
import yaml

from fp4rl.cli.main import main


def test_a_pattern_without_a_hit_is_one_line_with_the_nearest_name_before_anything_runs(
    in_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spec = {
        "model": {"embedded": {"warm_up_steps": 2}},
        "evaluation": {"count": 8},
        "injection": {"mode": "w4a16", "targets": {"take": ["*.qproj"]}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(spec))
    code = main(["run", "s.yaml"])
    err = capsys.readouterr().err.strip()
    assert code == 2, err
    assert "\n" not in err
    assert "*.qproj" in err
    assert "q_proj" in err
    assert not list((tmp_path / "runs" / "s").glob("run-*"))


SMALL = {
    "model": {"embedded": {"warm_up_steps": 2}},
    "training": {
        "steps": 1,
        "train_batch_size": 2,
        "mini_batch_size": 2,
        "rollout_n": 2,
        "max_response_length": 8,
        "overlong_buffer": {"enable": False},
        "filter_groups": {"enable": False},
        "entropy_coeff": 1e-3,  # a gradient even where no answer is right
    },
    "evaluation": {"count": 4, "max_new_tokens": 8, "profiles": ["full"]},
}


def test_a_suite_leaves_its_table_and_page_and_a_single_run_says_where_it_is(in_process, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"suite": "trial", "base": SMALL, "arms": {"bf16": {}}, "seeds": [0]})
    )
    assert main(["run", "s.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "trial  1 of 1 run" in shown
    assert "HTML report: runs/trial/report.html" in shown
    assert (tmp_path / "runs" / "trial" / "report.html").is_file()
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["run", "one.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "`fp4rl show one/run-s0-" in shown
    (last,) = [line.split() for line in shown.splitlines() if " last " in line]
    (run,) = (tmp_path / "runs" / "one").glob("run-s0-*")
    right = json.loads((run / "result.json").read_text())["evaluations"][-1]["strict"]
    assert last[:5] == ["1", "last", "full", "4", f"{100 * right:.1f}"]


@pytest.mark.slow
def test_two_steps_on_gsm8k_with_the_embedded_model(shared_data, tmp_path, capsys):
    spec = {
        "model": {"embedded": {"warm_up_steps": 2}},
        "task": {"name": "gsm8k", "path": str(shared_data / "gsm8k" / "train.jsonl")},
        "training": {
            "steps": 2,
            "train_batch_size": 2,
            "mini_batch_size": 1,
            "rollout_n": 4,
            "max_prompt_length": 1152,
            "max_response_length": 32,
            "overlong_buffer": {"len": 8},
            "filter_groups": {"enable": False},
            "entropy_coeff": 1e-3,
        },
        "injection": "w4a16",
        "evaluation": {"count": 8, "max_new_tokens": 32, "profiles": ["full", "deployment"]},
    }
    (tmp_path / "gsm8k.yaml").write_text(yaml.safe_dump(spec))
    assert main(["run", str(tmp_path / "gsm8k.yaml"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]) == 0
    (run,) = (tmp_path / "runs" / "gsm8k").glob("run-s0-*")
    result = json.loads((run / "result.json").read_text())
    assert result["steps_done"] == 2
    assert [e["profile"]["scorer"] for e in result["evaluations"]] == ["gsm8k"] * 4
    capsys.readouterr()
    assert main(["eval", str(run / "final"), "-p", "full", "-p", "w4a4", "--count", "8", "--json"]) == 0
    assert [e["profile"]["precision"] for e in json.loads(capsys.readouterr().out)] == ["full", "w4a4"]
