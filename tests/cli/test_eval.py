"""`fp4rl eval`: what its table says, and that it fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fp4rl.cli.eval import _asked_task, _described, _notes, _saved_in, _table, asked_profiles
from fp4rl.rl.evaluate import EvaluationRunner
from fp4rl.spec.errors import InvalidValueError, UserError
from fp4rl.spec.evidence import Evaluation, Profile
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse


def summary(name, n, **more):
    return {
        "profile": {"name": name, "max_new_tokens": 48},
        "n": n,
        "strict": 0.3625,
        "flexible": 0.4,
        "formatted": 1.0,
        "truncated": 0.025,
        "mean_length": 31.25,
        **more,
    }


@pytest.fixture
def lines(capsys):
    def show(*summaries):
        found = [Evaluation(step=0, **{**s, "profile": Profile(**s["profile"])}) for s in summaries]
        Console(width=80).print(_table("models/mine", found))
        return capsys.readouterr().out.splitlines()

    return show


def test_several_answers_to_a_problem_count_as_one_trial_and_the_table_says_so(lines):
    shown = "\n".join(lines(summary("full", 80, problems=40, **{"pass@1": 0.36, "pass@2": 0.5})))
    assert "2 answers each" in shown
    assert "n problems as trials" in shown
    assert " 40 " in shown


def test_a_profile_says_which_deployment_it_imitates(lines):
    mode = summary("w4a4", 80) | {"profile": {"name": "w4a4", "precision": "w4a4", "deployment": "vllm_blackwell"}}
    own = summary("mine", 80) | {"profile": {"name": "mine", "precision": "w4a16", "deployment": "amct"}}
    shown = "\n".join(lines(summary("full", 80), mode, own))
    assert "w4a4: imitates vllm_blackwell" in shown
    assert "mine: w4a16, imitates amct" in shown
    assert "full: " not in shown


def test_nothing_is_cut_on_80_columns(lines):
    shown = lines(summary("matmul_noise=0.05", 80, problems=40, **{"pass@1": 0.36, "pass@2": 0.5}))
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)
    row = next(line for line in shown if "matmul_noise" in line)
    assert row.split()[-3:] == ["2.5", "31.2", "50.0"]  # pass@1 is the mean accuracy: it stands there already
    assert row.count("[") == row.count("]") == 1


def test_what_acted_stands_below_where_the_name_does_not_say_it(lines):
    """Kind: the label beside a number says what was described, not what acted."""
    own = {"profile": {"name": "mine", "precision": "w4a4, 3 sites mxfp8", "max_new_tokens": 48}}
    shown = "\n".join(
        lines(
            summary("full", 40) | {"profile": {"name": "full", "precision": "full", "max_new_tokens": 48}},
            summary("", 40) | own,
        )
    )
    assert "mine: w4a4, 3 sites mxfp8" in shown
    assert "full: full" not in shown


def test_one_answer_a_problem_needs_no_more_words(lines):
    assert "one answer each" in "\n".join(lines(summary("full", 40)))


@pytest.mark.parametrize(
    ("words", "names", "injections"),
    [
        (["full", "w4a4", "matmul_noise=0.05"], ["full", "w4a4", "matmul_noise=0.05"], {}),
        (["advice.yaml"], ["advice"], {"advice": {"mode": "w4a4"}}),
        (["mine=alone.yaml"], ["mine"], {"mine": {"weight": "mxfp8"}}),
        (["q/w4a4-s0/spec.yaml"], ["w4a4-s0"], {"w4a4-s0": {"kv_cache": "mxfp8"}}),
        (["kv={kv_cache: mxfp8}", "full"], ["kv", "full"], {"kv": {"kv_cache": "mxfp8"}}),
    ],
)
def test_a_profile_is_a_name_or_any_injection(words, names, injections, tmp_path, monkeypatch):
    """Kind: a profile can be any injection: a file of advice, a run's description, a mapping."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q" / "w4a4-s0").mkdir(parents=True)
    (tmp_path / "advice.yaml").write_text("injection: {mode: w4a4}\nnoise: {}\n")
    (tmp_path / "alone.yaml").write_text("weight: mxfp8\n")
    (tmp_path / "q" / "w4a4-s0" / "spec.yaml").write_text("seed: 0\ninjection: {kv_cache: mxfp8}\n")
    assert asked_profiles(words) == {"profiles": names, "injections": injections}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("suite.yaml", "a suite has many injections"),
        ("bf16.yaml", "injects nothing, which is the profile full"),
        ("gone.yaml", "no such file"),
        ("mine=w4a4", "write NAME=FILE.yaml"),
        ("mine={weight: ", "not valid YAML"),
    ],
)
def test_a_profile_that_is_no_injection_is_one_line(word, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text("suite: a\narms: {b: {}}\n")
    (tmp_path / "bf16.yaml").write_text("injection: null\n")
    with pytest.raises(UserError) as caught:
        asked_profiles([word])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_that_were_cut_off_stand_in_the_table_and_many_of_them_below_it(lines):
    """The kind: an accuracy that the token limit made is not shown as one of the model."""
    shown = lines(summary("full", 40), summary("w4a4", 40, truncated=0.775))
    assert " cut " in shown[1]
    assert [row.split()[-2] for row in shown[2:4]] == ["2.5", "77.5"]
    assert "78 % of the answers of w4a4 were cut off at the token limit, 48," in " ".join(" ".join(shown).split())
    assert "of the answers" not in " ".join(lines(summary("full", 40)))


def test_a_file_that_is_a_test_file_by_its_name_is_not_cut_by_mistake():
    """The kind: held-out data that is cut again; one tenth of a benchmark would stand for all of it."""
    file = Path("gsm8k/test.jsonl")
    with pytest.raises(
        InvalidValueError, match=r"only a tenth would be answered; --test-path gsm8k/test.jsonl answers all"
    ):
        _asked_task("gsm8k", file, None, None)
    assert _asked_task("gsm8k", file, None, "test") == {"name": "gsm8k", "path": str(file)}
    assert _asked_task("gsm8k", None, file, None) == {"name": "gsm8k", "path": str(file), "test_path": str(file)}
    for more in ({"data": file, "split": None}, {"data": None, "split": "test"}):
        with pytest.raises(InvalidValueError, match="drop --data and --split"):
            _asked_task("gsm8k", test_path=file, **more)


def test_a_sweep_of_a_bf16_model_has_it_as_it_is_in_the_place_of_bf16_weights():
    """The kind: a precision that the model's own dtype makes a nothing; the sweep used to be refused for it."""

    def profiles(dtype, *asked):
        return _described({"dtype": dtype}, {"name": "arithmetic"}, list(asked), True, {}).evaluation

    assert profiles("bfloat16", "w4a4").profiles == ("full", "w4a4")
    assert profiles("bfloat16", "w4a4", "full").profiles == ("full", "w4a4")
    assert profiles("bfloat16", "full").formats == ("mxfp8", "nvfp4", "mxfp4")
    for dtype in ("float32", "float16"):
        assert profiles(dtype, "w4a4").profiles == ("w4a4",)
        assert profiles(dtype, "full").formats == ("bf16", "mxfp8", "nvfp4", "mxfp4")


def run_eval(*words):
    done = subprocess.run([sys.executable, "-m", "fp4rl", "eval", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_test_file_is_answered_whole_within_the_tasks_own_limit(embedded_model, tmp_path):
    file = tmp_path / "gsm8k_test.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(23)))
    (found,) = run_eval(str(embedded_model), "--task", "gsm8k", "--test-path", str(file), "--json")
    assert (found["n"], found["profile"]["max_new_tokens"]) == (23, 1024)
    assert found["profile"]["sampling"] == "greedy, to 'Question:'"


@pytest.mark.slow
def test_the_sweep_of_a_bf16_model_runs(embedded_model):
    found = run_eval(str(embedded_model), "--count", "4", "--sweep", "--dtype", "bfloat16", "--json")
    shares = {one["profile"]["name"]: one["answers_digest"] for one in found}
    assert list(shares)[:3] == ["full", "matmul_noise=0", "matmul_noise=0.01"]
    assert shares["full"] == shares["matmul_noise=0"] != shares["matmul_noise=0.1"]


def test_what_a_packer_would_round_otherwise_is_said_once():
    """Kind: an evaluation of weights that no exporter makes of this folder."""
    spec = parse(Experiment, {"evaluation": {"profiles": ["full", "w4a8", "w4a4"], "deployment": "vllm_ascend"}}, "")
    runner = EvaluationRunner(spec.evaluation, None, spec.task, [])
    (said,) = _notes(runner, "float32")
    assert said.startswith("w4a8, w4a4: weights are cast to bfloat16 before they are rounded; of a float32 folder")
    assert list(_notes(runner, "bfloat16")) == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_folder_is_what_its_config_says(key, tmp_path):
    assert _saved_in(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({key: "float32"}))
    assert _saved_in(tmp_path) == "float32"


def test_an_answer_may_have_what_its_task_takes():
    """The kind: a limit made for the toy (48 tokens held 1.5 % of GSM8K's golds) on other tasks."""

    def limit(task, **given):
        return _described({"path": "m"}, task, ["full"], False, given).evaluation.max_new_tokens

    gsm8k = {"name": "gsm8k", "path": "train.jsonl"}
    assert (limit({"name": "arithmetic"}), limit(gsm8k), limit(gsm8k, max_new_tokens=7)) == (48, 1024, 7)
