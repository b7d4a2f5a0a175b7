"""`fp4rl new`: from a folder with a model and a table to a suite that plans and runs, by commands alone."""

import csv
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fp4rl.cli.described import run_described
from fp4rl.cli.main import main
from fp4rl.spec.experiment import Suite
from fp4rl.spec.load import load_spec
from fp4rl.tasks.arithmetic import Arithmetic
from fp4rl.tasks.guess import guessed


def questions(count):
    """Arithmetic whose answers are spelled digit by digit, as the embedded model writes them."""
    problems = Arithmetic().problems("train", count)
    return [
        {"Question": p.prompt.removeprefix("Q: ").removesuffix(" A:"), "Final answer": " ".join(p.answer)}
        for p in problems
    ]


def write_csv(file, rows):
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path, embedded_model, monkeypatch):
    """A folder with a model and a qa.csv of 300 rows, which is where one is."""
    shutil.copytree(embedded_model, tmp_path / "models" / "tiny")
    write_csv(tmp_path / "qa.csv", questions(300))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_model_and_the_table_are_found_and_the_suite_fits_them(folder, capsys):
    assert main(["new", "my_suite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["task"]["path"]) == ("models/tiny", "qa.csv")
    assert (said["task"]["question"], said["task"]["scorer"]) == ("Question", "exact")
    assert sum(said["problems"].values()) == 300
    suite = load_spec("my_suite.yaml")
    assert isinstance(suite, Suite)
    assert suite.base["evaluation"]["count"] == said["problems"]["test"]
    assert all("#" in line for line in (folder / "my_suite.yaml").read_text().splitlines() if "guess" in line)
    capsys.readouterr()
    assert main(["plan", "my_suite.yaml"]) == 0
    assert "6 runs" in capsys.readouterr().out
    assert main(["data", "my_suite.yaml"]) == 0
    assert main(["plan", "my_suite.yaml", "--show-prompt", "--json"]) == 0
    *_, printed = capsys.readouterr().out.partition("[")
    (prompt,) = json.loads("[" + printed)
    assert len(prompt["token_ids"]) <= suite.base["training"]["max_prompt_length"]


def test_what_is_said_names_the_guesses_and_the_next_commands(folder, capsys):
    assert main(["new", "my_suite.yaml"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "guessed: question = Question, answer = Final answer, scorer = exact" in out
    assert "fp4rl plan my_suite.yaml --show-prompt fp4rl data my_suite.yaml fp4rl run my_suite.yaml" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"])
def test_a_fresh_suite_warns_of_nothing_whatever_the_model(folder, capsys, dtype, template):
    """The packer of a folder rounds the folder's own values: so does the suite, in training and afterwards."""
    model = folder / "models" / "tiny"
    weights = {
        name: values.to(getattr(torch, dtype)) for name, values in load_file(model / "model.safetensors").items()
    }
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    assert main(["new", "s"]) == 0
    assert main(["plan", "s.yaml"]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.out + said.err
    trained, plain = (run_described("s.yaml", [], arm).experiment for arm in ("w4a8", _NAMES[dtype]))
    assert trained.model.dtype == trained.injection.dtype == dtype
    assert plain.evaluation.injections["quantized"] == trained.injection


_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my suite"], "a name is letters, digits"),
        (["s", "--model", "gone"], "--model gone: no config.json there"),
        (["s", "--data", "gone.csv"], "--data gone.csv: no such file"),
        (["s", "--answer", "gone"], "no column 'gone'"),
        (["taken"], "taken.yaml: is there already"),
    ],
)
def test_what_cannot_be_is_one_line(folder, capsys, words, message):
    (folder / "taken.yaml").write_text("")
    assert main(["new", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "s.yaml").exists()


def test_two_tables_are_not_chosen_between_unless_one_is_the_test_file(folder, capsys):
    write_csv(folder / "more.csv", questions(300)[:40])
    assert main(["new", "s"]) == 2
    assert "2 are here (more.csv, qa.csv); name it with --data" in capsys.readouterr().err
    (folder / "more.csv").rename(folder / "qa_test.csv")
    write_csv(folder / "qa.csv", questions(300)[40:])
    assert main(["new", "s", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["task"]["test_path"] == "qa_test.csv"
    assert said["problems"]["test"] == 40


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"question": "1+1?", "answer": "2"}, {"question": "question", "answer": "answer", "scorer": "number"}),
        (
            {"problem": "1+1?", "solution": r"\boxed{2}"},
            {"question": "problem", "answer": "solution", "scorer": "math_verify"},
        ),
        (
            {"problem": "x?", "answer": r"\frac{1}{2}"},
            {"question": "problem", "answer": "answer", "scorer": "math_verify"},
        ),
        (
            {"q": "Which?", "choices": ["x", "y"], "answer": 1},
            {"question": "q", "answer": "answer", "choices": "choices", "scorer": "choice"},
        ),
        (
            {"Question": "Which?", "A": "x", "B": "y", "Answer": "B"},
            {"question": "Question", "answer": "Answer", "choices": ["A", "B"], "scorer": "choice"},
        ),
        (
            {"Frage": "Hauptstadt von Frankreich?", "Wort": "Paris"},
            {"question": "Frage", "answer": "Wort", "scorer": "exact"},
        ),
        ({"question": "x?", "answer": "C"}, {"question": "question", "answer": "answer", "scorer": "choice"}),
        (
            {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "3"}},
            {"scorer": "number"},
        ),
    ],
)
def test_columns_and_scorer_are_guessed_from_names_and_answers(tmp_path, row, keys):
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    assert guessed(tmp_path / "t.jsonl") == keys


def test_an_answer_that_cannot_be_guessed_is_asked_for(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"ask": "a long question?", "x": "1", "y": "2"}))
    with pytest.raises(ValueError, match="which column is the answer"):
        guessed(tmp_path / "t.jsonl")


@pytest.mark.slow
def test_a_stranger_goes_from_a_model_and_a_table_to_a_report(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """The commands of docs/how-to/own-task.md, on the warmed-up embedded model as an ordinary folder."""
    from fp4rl.rl.inputs import warmed_up
    from fp4rl.spec.model import Embedded

    shutil.copytree(warmed_up(Embedded(), Arithmetic(), tmp_path_factory.mktemp("cache")), tmp_path / "models" / "tiny")
    write_csv(tmp_path / "qa.csv", questions(300))
    monkeypatch.chdir(tmp_path)
    assert main(["new", "my_suite"]) == 0
    plain = yaml.safe_load((tmp_path / "my_suite.yaml").read_text())
    prompt = ['task.prompt="Q: {question} A:"', "training.lr=4e-4", "training.max_response_length=48"]
    prompt += ["evaluation.max_new_tokens=48"]
    commands = (
        ["plan", "my_suite.yaml", *prompt, "--show-prompt"],
        ["data", "my_suite.yaml", *prompt],
        ["run", "my_suite.yaml", *prompt, "training.steps=3", "seeds=[0,1]", "--jobs", "1"],
        ["report", "runs/my_suite"],
    )
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    assert plain["base"]["task"]["answer"] == "Final answer"
    assert (tmp_path / "runs" / "my_suite" / "report.html").stat().st_size > 10_000
    results = [json.loads(file.read_text()) for file in (tmp_path / "runs" / "my_suite").glob("*/result.json")]
    assert len(results) == 4
    assert all(evaluation["profile"]["scorer"] == "table, exact" for r in results for evaluation in r["evaluations"])
    assert max(evaluation["strict"] for r in results for evaluation in r["evaluations"]) > 0.2


SMALL = (
    *(
        "model.path=null",
        "model.embedded.warm_up_steps=2",
        "model.dtype=float32",
        "seeds=[0]",
        "evaluation.count=3",
        "training.steps=1",
    ),
    *(
        "training.train_batch_size=4",
        "training.mini_batch_size=2",
        "training.micro_batch_size=4",
        "training.rollout_n=4",
    ),
    *("training.max_response_length=32", "evaluation.max_new_tokens=32", "training.algorithm=grpo"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "row", "more"),
    [
        (
            "math",
            lambda n: {"problem": f"Halve {n}.", "solution": rf"It is \boxed{{\frac{{{n}}}{{2}}}}."},
            ["training.overlong_buffer.enable=false"],
        ),
        ("choice", lambda n: {"question": f"Which is {n}?", "choices": [n, n + 1, n + 2], "answer": n % 3}, []),
    ],
)
def test_the_suites_of_the_catalogue_for_formulas_and_choices_run_on_local_files(
    suite, row, more, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(60)))
    words = [f"catalogue/{suite}", "task.path=rows.jsonl", *SMALL, *more]
    assert main(["data", *words]) == 0
    # Rewards that do not depend on chance: the embedded model of two steps never answers right.
    (tmp_path / "brief.py").write_text("def brief(*, completion, **_):\n    return -float(len(completion))\n")
    assert main(["run", *words, f"training.reward={tmp_path}/brief.py:brief", "--jobs", "1"]) == 0
    scorers = {
        evaluation["profile"]["scorer"]
        for file in (tmp_path / "runs" / suite).glob("*/result.json")
        for evaluation in json.loads(file.read_text())["evaluations"]
    }
    assert scorers == {f"table, {'math_verify' if suite == 'math' else 'choice'}"}
