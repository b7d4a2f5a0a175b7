"""`fp4rl eval`: what its table says, and that it fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from fp4rl.cli.eval_profiles import asked_profiles
from fp4rl.cli.eval_source import Source, asked_task, cut_from, described, source_of, with_task
from fp4rl.cli.eval_view import differences_table, notes, samples_table, saved_in, shares_table
from fp4rl.cli.main import main
from fp4rl.rl.evaluate import EvaluationRunner
from fp4rl.spec import evaluation as spec
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
        Console(width=80).print(shares_table("models/mine", found))
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
    shown = lines(summary("matmul_noise=0.05", 80, problems=40, kl=1.234e-05, **{"pass@1": 0.36, "pass@2": 0.5}))
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)
    row = next(line for line in shown if "matmul_noise" in line)
    assert row.split()[-3:] == ["2.5", "31.2", "1.23e-05"]
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
        (["mode=w4a4 deployment=amct"], ["w4a4+amct"], {"w4a4+amct": {"mode": "w4a4", "deployment": "amct"}}),
        (["mine=mode=w4a4 preset=amct"], ["mine"], {"mine": {"mode": "w4a4", "deployment": "amct"}}),
        (["weight=mxfp8"], ["weight_mxfp8"], {"weight_mxfp8": {"weight": "mxfp8"}}),
        (
            ['mode=w4a4 by_pattern={"*.up_proj": mxfp8, "*.q_proj": none} targets.layers=[1]'],
            ["w4a4+by_pattern+targets"],
            {
                "w4a4+by_pattern+targets": {
                    "mode": "w4a4",
                    "by_pattern": {"*.up_proj": "mxfp8", "*.q_proj": "none"},
                    "targets": {"layers": [1]},
                }
            },
        ),
        (["several.yaml"], ["a", "b"], {"a": {"weight": "mxfp8"}, "b": {"mode": "w4a4"}}),
        (["x=several.yaml"], ["x.a", "x.b"], {"x.a": {"weight": "mxfp8"}, "x.b": {"mode": "w4a4"}}),
    ],
)
def test_a_profile_is_a_name_or_any_injection(words, names, injections, tmp_path, monkeypatch):
    """Kind: a profile can be any injection: a file of advice, a run's description, a mapping."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q" / "w4a4-s0").mkdir(parents=True)
    (tmp_path / "advice.yaml").write_text("injection: {mode: w4a4}\nnoise: {}\n")
    (tmp_path / "alone.yaml").write_text("weight: mxfp8\n")
    (tmp_path / "several.yaml").write_text("a: {weight: mxfp8}\nb: {injection: {mode: w4a4}, noise: {}}\n")
    (tmp_path / "q" / "w4a4-s0" / "spec.yaml").write_text("seed: 0\ninjection: {kv_cache: mxfp8}\n")
    assert asked_profiles(words) == {"profiles": names, "injections": injections}
    own = [word for word in words if word not in ("full", "w4a4", "matmul_noise=0.05")]
    assert asked_profiles(["full"], own) == {"profiles": ["full", *injections], "injections": injections}
    for name, content in injections.items():
        assert parse(spec.Evaluation, {"profiles": [name], "injections": {name: content}}, "").injections


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("suite.yaml", "a suite has many injections"),
        ("bf16.yaml", "injects nothing, which is the profile full"),
        ("gone.yaml", "no such file"),
        ("mine=w4a4", "write NAME=FILE.yaml"),
        ("mine={weight: ", "not valid YAML"),
        ("mode=w4a4 deplyment=amct", "no key of an injection is called 'deplyment'; did you mean 'deployment'?"),
        ("empty.yaml", "is empty"),
    ],
)
def test_a_profile_that_is_no_injection_is_one_line(word, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text("suite: a\narms: {b: {}}\n")
    (tmp_path / "bf16.yaml").write_text("injection: null\n")
    (tmp_path / "empty.yaml").write_text("")
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
        asked_task({}, "gsm8k", {"data": file}, None)
    assert asked_task({}, "gsm8k", {"data": file}, "test") == {"name": "gsm8k", "path": str(file)}
    assert asked_task({}, "gsm8k", {"test_path": file}, None) == {
        "name": "gsm8k",
        "path": str(file),
        "test_path": str(file),
    }
    for data, split in ((file, None), (None, "test")):
        with pytest.raises(InvalidValueError, match="drop --data and --split"):
            asked_task({}, "gsm8k", {"data": data, "test_path": file}, split)


def test_a_sweep_of_a_bf16_model_has_it_as_it_is_in_the_place_of_bf16_weights():
    """The kind: a precision that the model's own dtype makes a nothing; the sweep used to be refused for it."""

    def profiles(dtype, *asked):
        return described(Source(Path("m")), dtype, {"name": "arithmetic"}, list(asked), True, {}).evaluation

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
    (said,) = notes(runner, "float32")
    assert said.startswith("w4a8, w4a4: weights are cast to bfloat16 before they are rounded; of a float32 folder")
    assert list(notes(runner, "bfloat16")) == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_folder_is_what_its_config_says(key, tmp_path):
    assert saved_in(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({key: "float32"}))
    assert saved_in(tmp_path) == "float32"


def test_an_answer_may_have_what_its_task_takes():
    """The kind: a limit made for the toy (48 tokens held 1.5 % of GSM8K's golds) on other tasks."""

    def limit(task, **given):
        return described(Source(Path("m")), None, task, ["full"], False, given).evaluation.max_new_tokens

    gsm8k = {"name": "gsm8k", "path": "train.jsonl"}
    assert (limit({"name": "arithmetic"}), limit(gsm8k), limit(gsm8k, max_new_tokens=7)) == (48, 1024, 7)


def test_pass_and_majority_stand_apart_with_their_intervals(capsys):
    """Wilson for 20 of 40: (0.352, 0.648), by the closed form worked out by hand."""
    more = {"problems": 40, "pass@1": 0.36, "pass@2": 0.5, "maj@2": 0.25}
    whole = summary("full", 80, **more)
    (row,) = [Evaluation(step=0, **{**whole, "profile": Profile(**whole["profile"])})]
    Console(width=80).print(samples_table([row]))
    shown = capsys.readouterr().out
    assert "50.0 [35.2, 64.8]" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("full")] == ["pass@2", "maj@2"]
    assert samples_table([Evaluation(step=0, strict=0.5, n=40)]) is None


def test_a_paired_difference_says_what_flipped(capsys):
    from fp4rl.lab.statistics.proportions import ShareDifference

    Console(width=80).print(
        differences_table("full", {"matmul_noise=0.05": (ShareDifference(-0.05, -0.1, 0.0, 0.04), 2, 7)})
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["matmul_noise=0.05", "-5.0", "[-10.0,", "+0.0]", "2", "7", "0.04"]
    assert max(map(len, lines)) <= 80


OWN = {
    "model": {"path": "gone/start", "dtype": "bfloat16", "lora": {"rank": 2}},
    "task": {"name": "gsm8k", "path": "train.jsonl", "prompt": "Q: {question} A:"},
    "injection": {"mode": "w4a8", "deployment": "vllm_ascend"},
    "training": {"steps": 9},
    "evaluation": {
        "count": 7,
        "max_new_tokens": 99,
        "stop": ["Q:"],
        "profiles": ["full", "deployment", "mine"],
        "injections": {"mine": {"weight": "mxfp8"}},
        "matmul_noise": [0.1],
        "deployment": "amct",
    },
}


@pytest.fixture
def of_a_run(tmp_path):
    """A run's folder with its description, a final policy and a checkpoint, all without weights."""
    folder = tmp_path / "runs" / "suite" / "w4a8-s0-abcdef"
    for place in (folder / "final", folder / "checkpoints" / "checkpoint-4"):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(b"")
    (folder / "spec.yaml").write_text(yaml.safe_dump(OWN))
    return folder


def test_a_run_is_judged_by_its_own_description(of_a_run):
    checkpoint = of_a_run / "checkpoints" / "checkpoint-4"
    source = source_of(checkpoint, of_a_run.parents[1])
    assert (source.folder, source.name) == (checkpoint, "suite/w4a8-s0-abcdef checkpoint-4")
    task = asked_task(source.own["task"], None, {}, None)
    found = described(source, None, task, [], False, {"count": None, "samples": 4})
    assert (found.task.path, found.task.prompt) == ("train.jsonl", "Q: {question} A:")
    assert (found.model.path, found.model.dtype, found.model.lora) == (str(checkpoint), "bfloat16", None)
    evaluation = found.evaluation
    assert evaluation.all_profiles == ("full", "deployment", "mine")
    assert (evaluation.count, evaluation.max_new_tokens, evaluation.stop) == (7, 99, ("Q:",))
    assert (evaluation.samples, evaluation.deployment) == (4, "amct")
    assert found.injection == parse(Experiment, {"injection": OWN["injection"]}, "").injection
    other = described(source, "float32", task, ["mine", "w4a4"], False, {"count": 3})
    assert (other.evaluation.profiles, other.evaluation.count, other.model.dtype) == (("mine", "w4a4"), 3, "float32")


def test_another_file_or_task_takes_the_place_of_a_runs_own(of_a_run):
    own = OWN["task"]
    assert asked_task(own, None, {"test_path": Path("test.jsonl")}, None) == own | {
        "path": "test.jsonl",
        "test_path": "test.jsonl",
    }
    assert asked_task(own, "arithmetic", {}, None) == {"name": "arithmetic"}
    with pytest.raises(InvalidValueError, match="the arithmetic task has no key few_shot"):
        asked_task(own, "arithmetic", {}, None, 3)
    with pytest.raises(InvalidValueError, match="solved problems come from --data"):
        asked_task(own, None, {"test_path": Path("test.jsonl")}, None, 3)


def test_a_folder_is_judged_on_the_task_of_a_suite_or_of_words(tmp_path):
    arms = {"a": {"training": {"max_response_length": 33}}, "b": {"injection": "w4a4"}}
    suite = {"suite": "s", "base": {"task": OWN["task"], "evaluation": {"stop": ["X"]}}, "arms": arms}
    files = {name: tmp_path / f"{name}.yaml" for name in ("same", "two")}
    files["same"].write_text(yaml.safe_dump(suite))
    files["two"].write_text(yaml.safe_dump(suite | {"arms": {**arms, "c": {"task": {"prompt": "{question}"}}}}))

    def judged(word, **given):
        source = with_task(Source(Path("m")), word)
        return described(source, None, asked_task(source.own["task"], None, {}, None), [], False, given)

    of_suite, of_words = judged(str(files["same"])), judged("name=gsm8k path=train.jsonl prompt=Say {question} =>")
    assert of_suite.task == parse(Experiment, {"task": OWN["task"]}, "").task
    assert (of_suite.evaluation.stop, of_suite.evaluation.profiles) == (("X",), ("full",))
    assert (of_words.task.path, of_words.task.prompt) == ("train.jsonl", "Say {question} =>")
    assert (of_words.evaluation.max_new_tokens, judged(str(files["same"]), stop=["Y"]).evaluation.stop) == (
        1024,
        ("Y",),
    )
    assert (
        cut_from(with_task(Source(Path("m")), str(files["same"])), None, None, "test")
        == "problems: the task's test split"
    )
    with pytest.raises(InvalidValueError, match="its arms have several tasks; name one by words"):
        judged(str(files["two"]))
    with pytest.raises(InvalidValueError, match="say which task: name=gsm8k"):
        judged("path=train.jsonl")
    with pytest.raises(InvalidValueError, match="a run's own injection"):
        described(with_task(Source(Path("m")), str(files["same"])), None, OWN["task"], ["deployment"], False, {})


def test_a_folder_has_no_deployment_of_its_own(of_a_run):
    (of_a_run.parent / "model").mkdir()
    (of_a_run.parent / "model" / "config.json").write_text("{}")
    source = source_of(of_a_run.parent / "model", of_a_run)
    assert not source.own
    with pytest.raises(InvalidValueError, match="a run's own injection"):
        described(source, None, {"name": "arithmetic"}, ["deployment"], False, {})


def test_a_run_that_is_not_finished_has_checkpoints(of_a_run):
    with pytest.raises(InvalidValueError, match="is not finished; name one of its checkpoints"):
        source_of(of_a_run, of_a_run.parents[1])


def test_a_checkpoint_in_parts_is_refused_by_name(of_a_run):
    (of_a_run / "checkpoints" / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(InvalidValueError, match="no whole weights"):
        source_of(of_a_run / "checkpoints" / "checkpoint-4", of_a_run)


def test_answers_are_sampled_paired_and_written(embedded_model, tmp_path, capsys):
    words = ["eval", str(embedded_model), "-p", "full", "-p", "w4a4", "--count", "6", "--max-new-tokens", "8"]
    out = tmp_path / "items.jsonl"
    assert main([*words, "--samples", "4", "--seed", "3", "--temperature", "0.7", "--out", str(out), "--json"]) == 0
    full, rounded = json.loads(capsys.readouterr().out)
    assert full["profile"]["sampling"] == "4 samples at temperature 0.7, seed 3"
    assert {"pass@1", "pass@2", "pass@4"} <= full.keys() & full["intervals"].keys()
    assert "difference" not in full
    assert (full["kl"], full["same_top"]) == (0.0, 1.0)
    assert rounded["kl"] > 0
    assert rounded["kl_tokens"] == pytest.approx(24 * rounded["mean_length"])
    assert (rounded["difference"]["to"], rounded["problems"]) == ("full", 6)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 * 6 * 4
    shares = {name: sum(row["strict"] for row in rows if row["profile"] == name) / 24 for name in ("full", "w4a4")}
    assert (full["strict"], rounded["strict"]) == (shares["full"], shares["w4a4"])
    assert rounded["difference"]["value"] == pytest.approx(shares["w4a4"] - shares["full"])
    assert main([*words, "--seed", "3"]) == 2
    assert "one is greedy: add --samples 4" in capsys.readouterr().err
    assert main(["eval", str(embedded_model), "--count", "4", "--max-new-tokens", "8"]) == 0
    assert "difference" not in capsys.readouterr().out


def test_solved_problems_stand_before_each_and_none_of_them_is_answered(embedded_model, tmp_path, capsys):
    """Few-shot: the oracle is the text of the prompt itself."""
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(40)))
    own = asked_task({}, "gsm8k", {"data": file}, None, 2)
    experiment = described(Source(tmp_path), None, own, ["full"], False, {})
    prompt = experiment.task.problems("test", 1)[0].prompt
    assert prompt.count("Answer: #### ") == 2
    shown = {text for text in (f"{i} + 1?" for i in range(40)) if text in prompt.rpartition("Question:")[0]}
    assert not any(text in prompt.rpartition("Question:")[2] for text in shown)
    words = [str(embedded_model), "--task", "gsm8k", "--data", str(file), "--few-shot", "2", "--count", "2"]
    assert main(["eval", *words, "--max-new-tokens", "4", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["n"] == 2
