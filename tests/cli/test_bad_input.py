"""What a user gets wrong: one line with the cure on standard error, exit code 2, no traceback, nothing half-written."""

import shutil
import subprocess
import sys

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.runner import SuiteOutcome

SUITE = "suite: s\nbase: {}\narms: {a: {}}\nseeds: [0]\n"


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """`said(arguments)` -> (exit code, the lines on standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([str(a) for a in arguments])
        return code, capsys.readouterr().err.strip()

    return run


def one_line(code, err, *parts):
    assert code == 2, err
    assert "\n" not in err, err
    assert err.startswith("fp4rl: ")
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("training.stpes=3", ["training.stpes", "'steps'"]),
        ("noise={schedule: {sigma_end: 0}}", ["sigma_end", "noise: none"]),
        ("noise={schedule: {num_stages: 2}}", ["num_stages", "at least 3"]),
        ("injection={weight: mxfp5}", ["mxfp5", "did you mean"]),
        ("injection=w5a16", ["w5a16", "did you mean"]),
        ("task={name: arithmetik}", ["task", "arithmetic"]),
        ("training.lr=fast", ["training.lr", "fast"]),
        ("training.lr", ["key.path=value"]),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_wrong_spec(said, tmp_path, verb, change, parts):
    file = tmp_path / "s.yaml"
    file.write_text(SUITE)
    one_line(*said(verb, file, change), *parts)
    assert not (tmp_path / "runs").exists()


def test_files_that_are_not_there_stop_a_run_before_anything_is_written(said, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text("model: {path: models/none}\ntask: {name: gsm8k, path: gone.jsonl}\n")
    one_line(*said("run", file), "model.path: models/none does not exist", "1 more")
    assert not (tmp_path / "runs").exists()
    assert said("plan", file)[0] == 0


def test_what_is_hardly_meant_is_one_line_in_the_plan_and_before_the_run(tmp_path, capsys, monkeypatch):
    file = tmp_path / "s.yaml"
    file.write_text(SUITE.replace("[0]", "[0, 1]"))
    monkeypatch.setattr("fp4rl.cli.run.run_all", lambda *_: SuiteOutcome())
    for verb, rest in (("plan", ()), ("run", ("--runs", str(tmp_path / "runs")))):
        assert main([verb, str(file), "evaluation.test_freq=7", *rest]) == 0
        shown = "".join(capsys.readouterr())
        assert shown.count("warning: evaluation.test_freq 7 does not divide 30 steps") == 1


def test_an_override_that_no_run_follows_is_said(tmp_path, capsys, monkeypatch):
    """Kind: a key given on the command line that every arm or an axis sets itself, which was dropped without a word."""
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "arms.yaml"
    file.write_text(
        "suite: arms\nbase: {training: {steps: 5}}\naxes: {injection.deployment: [ocp, modelopt]}\n"
        "arms: {a: {injection: {mode: w4a8}}, b: {injection: {mode: w4a4}, training: {lr: 1.0e-3}}}\n"
    )
    overrides = ("injection.mode=w4a9", "injection.deployment=amct", "training.steps=5", "training.steps=7")
    found = {}
    for word in (*overrides, "training.lr=2.0e-3", "arms.a.injection.mode=w4a16", "seeds=[0,1,2]"):
        assert main(["plan", str(file), word]) == 0
        found[word] = f"warning: {word} changes no run" in capsys.readouterr().err
    assert [word for word, said in found.items() if said] == list(overrides[:3])
    assert main(["plan", str(file), "training.train_batch_size=4", "training.mini_batch_size=4"]) == 0
    assert "changes no run" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb, how", [("run", "stopped; the same command continues where it left off"), ("formats", "stopped")]
)
def test_an_interrupted_command_says_how_to_go_on_where_it_does(said, monkeypatch, verb, how):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fp4rl.cli.{verb}.command", interrupted)
    assert said(verb) == (130, f"fp4rl: {how}")


@pytest.mark.parametrize("verb", ["run", "quickstart"])
def test_a_wrong_place_to_report_to(said, tmp_path, verb):
    (tmp_path / "s.yaml").write_text(SUITE)
    file = ["s.yaml"] if verb == "run" else []
    one_line(*said(verb, *file, "--report-to", "wandbb"), "wandbb", "did you mean 'wandb'")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_key_names_the_file(said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("trainig: {steps: 3}\n")
    one_line(*said("plan", file), "mine.yaml", "'trainig'", "'training'")


def test_a_spec_that_is_not_there(said):
    one_line(*said("plan", "nothing.yaml"), "nothing.yaml", "no such file")


def test_a_suite_that_the_catalogue_does_not_hold(said):
    one_line(*said("plan", "catalogue/quickstrat"), "did you mean 'quickstart'")


def test_a_runs_folder_that_cannot_be_written(said, tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(SUITE)
    (tmp_path / "taken").write_text("a file")
    one_line(*said("run", file, "--runs", tmp_path / "taken"), "cannot write", "--runs")


def test_eval_of_a_folder_that_is_not_there(said, tmp_path):
    one_line(*said("eval", tmp_path / "none"), "does not exist")


def test_eval_at_a_precision_that_does_not_exist(said, tmp_path):
    one_line(*said("eval", tmp_path, "-p", "w4a17"), "w4a17", "did you mean")


def test_eval_under_a_deployment_that_does_not_exist_although_no_profile_uses_it(said, tmp_path):
    one_line(
        *said("eval", tmp_path, "-p", "full", "--deployment", "vllm_hoper"),
        "evaluation.deployment",
        "did you mean 'vllm_hopper'",
    )


def test_power_without_runs_names_the_other_cure(said):
    one_line(*said("power", "2.5"), "--spread")


def test_eval_of_a_model_without_a_tokenizer(said, tmp_path, embedded_model):
    folder = shutil.copytree(embedded_model, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    one_line(*said("eval", folder), "no tokenizer", "save")


@pytest.mark.parametrize(
    "arguments",
    [["eval", "--out", "no/x.parquet"], ["scan", "--html", "no/x.html"], ["scan", "--advise", "no/x.yaml"]],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(said, arguments):
    verb, option, file = arguments
    one_line(*said(verb, "gone", option, file), option, "no folder no", "another place")


def test_a_file_that_is_there_is_not_written_over_by_eval(said, tmp_path):
    (tmp_path / "x.parquet").write_text("mine")
    one_line(*said("eval", "gone", "--out", "x.parquet"), "is there already")


def test_a_folder_as_the_file_to_write_is_refused(said, tmp_path):
    one_line(*said("scan", "gone", "--html", tmp_path), "is a folder")


def test_a_scan_to_compare_with_that_is_not_there(said):
    one_line(*said("scan", "gone", "--against", "gone.json"), "gone.json", "does not exist")


def test_a_gsm8k_file_that_is_not_there(said, tmp_path):
    one_line(*said("eval", tmp_path, "--task", "gsm8k", "--data", "gone.jsonl"), "gone.jsonl", "does not exist")


@pytest.mark.parametrize(
    ("options", "part"),
    [(["--task", "gsm8k"], "needs --data"), (["--data", "x.jsonl"], "--task gsm8k"), (["--task", "gsm9k"], "'gsm8k'")],
)
def test_a_task_and_its_file_belong_together(said, tmp_path, options, part):
    code, err = said("eval", tmp_path, *options)
    one_line(code, err, part)
    assert err.count("fp4rl") == 1


WITHOUT_TORCH = {
    "training.stpes": ["run", "s.yaml", "training.stpes=3"],
    "models/none does not exist": ["run", "m.yaml"],
    "model.path: gone does": ["eval", "gone"],
    "'w4a17'": ["eval", ".", "-p", "w4a17"],
    "'int3'": ["eval", ".", "--dtype", "int3"],
    "task.path: gone.jsonl": ["eval", ".", "--task", "gsm8k", "--data", "gone.jsonl"],
    "model.path: away does": ["scan", "away"],
    "'mxfp5'": ["scan", "s.yaml", "format=mxfp5"],
    "model.path: lost does": ["sites", "lost"],
}


def test_a_mistake_is_answered_before_torch_is_imported(tmp_path):
    """Kind: what the description alone shows to be wrong, in every verb that goes on to load a model."""
    (tmp_path / "s.yaml").write_text(SUITE)
    (tmp_path / "m.yaml").write_text("model: {path: models/none}\n")
    program = (
        "import sys\nfrom fp4rl.cli.main import main\n"
        f"for arguments in {list(WITHOUT_TORCH.values())!r}:\n"
        "    assert main(arguments) == 2, arguments\n    assert 'torch' not in sys.modules, arguments\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for part in WITHOUT_TORCH:
        assert part in found.stderr, found.stderr


@pytest.mark.parametrize("verb", ["eval", "scan", "sites"])
def test_an_id_of_the_hub_gets_the_command_that_fetches_it(said, verb):
    one_line(*said(verb, "Qwen/Qwen2.5-0.5B"), "`hf download Qwen/Qwen2.5-0.5B --local-dir models/Qwen2.5-0.5B`")


def test_home_is_what_a_shell_means_by_it(said, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("model: {path: ~/none}\ntask: {name: gsm8k, path: ~/gone.jsonl}\n")
    one_line(*said("run", "~/s.yaml", "--runs=~/mine"), f"model.path: {tmp_path}/none does not exist", "1 more")
    one_line(*said("plan", "~/none.yaml"), f"{tmp_path}/none.yaml: no such file")
    one_line(*said("plan", "~/s.yaml", "+~/more.yaml"), f"{tmp_path}/more.yaml: no such file")
    one_line(*said("runs", "--runs=~/mine"), f"{tmp_path}/mine: no folder of runs")


@pytest.mark.parametrize(
    "arguments", [["plan", "a" * 400 + ".yaml"], ["runs", "--runs", "a" * 400], ["sites", "a" * 400]]
)
def test_a_name_that_no_file_system_takes_is_one_line(said, arguments):
    one_line(*said(*arguments))


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["plan"], ["plan", "--rnus", "x", "y.yaml"], ["run", "--jobs", "0", "x.yaml"]]
)
def test_a_wrong_command_line(said, arguments):
    one_line(*said(*arguments), "--help")


@pytest.mark.parametrize("words", [("plan", "+\0"), ("plan", "a\0.yaml"), ("runs", "--runs", "\0"), ("audit", "a\0b")])
def test_a_nul_in_a_path_is_one_line(words, said):
    """Kind: what `open` refuses before it looks; a YAML string may hold one."""
    one_line(*said(*words))


@pytest.mark.parametrize(
    "words", [("plan", "~nobody-here/a.yaml"), ("plan", "+~nobody-here"), ("runs", "--runs=~nobody-here")]
)
def test_the_home_of_nobody_is_one_line(words, said):
    """Kind: `~name` where nobody is called so, which a shell leaves as it is."""
    one_line(*said(*words), "~nobody-here")
