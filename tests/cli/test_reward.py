"""`fp4rl reward`: what it shows of answers, and its verdict on gold answers."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from fp4rl.cli.main import main

SPEC = """
task: {name: gsm8k, path: data.jsonl, prompt: "Question: {question}\\nAnswer:"}
training: {steps: 1, reward: REWARD, max_response_length: 8}
evaluation: {count: 2, profiles: [full]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(reward="accuracy", golds=None):
        golds = golds or [str(7 * i % 31) for i in range(1, 31)]
        rows = [{"question": f"What is number {i}?", "answer": f"so #### {gold}"} for i, gold in enumerate(golds)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "spec.yaml").write_text(SPEC.replace("REWARD", reward))
        return tmp_path

    return write


def rows_for(folder, **answers):
    lines = [
        {"prompt": f"Question: What is number {name[1:]}?\nAnswer:", "completion": text}
        for name, text in answers.items()
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "answers.jsonl"


def test_answers_of_a_file_are_shown_with_what_was_read_and_what_they_earn(here, capsys):
    file = rows_for(here(), q0="I add. #### 7", q1="It is 14", q2="#### 99")
    assert main(["reward", "spec.yaml", "--answers", file, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["reward"], each["read"]["accuracy"]) for each in told["answers"]] == [
        (1.0, "7"),
        (0.0, None),
        (0.0, "99"),
    ]
    assert told["gold"] == {"checked": 30, "faults": [], "notes": []}
    assert main(["reward", "spec.yaml", "--answers", file]) == 0
    shown = capsys.readouterr().out
    assert "gold '7': accuracy 1 (read '7')" in shown
    assert "30 gold answers checked" in shown
    Path("by_question.jsonl").write_text(json.dumps({"question": "What is number 0?", "completion": "#### 7"}))
    Path("by_question.csv").write_text("question,completion\nWhat is number 0?,#### 7\n")
    for file in ("by_question.jsonl", "by_question.csv"):
        assert main(["reward", "spec.yaml", "--answers", file, "--json"]) == 0
        assert [each["reward"] for each in json.loads(capsys.readouterr().out)["answers"]] == [1.0]


def test_several_rewards_are_shown_apart(here, capsys):
    folder = here()
    (folder / "own.py").write_text("def short(*, completion, **_):\n    return -len(completion)\n")
    file = rows_for(folder, q0="#### 7")
    parts = "training.rewards=[{name: accuracy}, {name: 'own.py:short', weight: 0.1}]"
    assert main(["reward", "spec.yaml", parts, "--answers", file, "--json"]) == 0
    out = capsys.readouterr()
    (each,) = json.loads(out.out)["answers"]
    assert each["parts"] == {"accuracy": 1.0, "own.py:short": -6.0}
    assert each["reward"] == pytest.approx(0.4)
    assert "own.py:short is Python code of your own" in out.err
    assert main(["reward", "spec.yaml", parts, "--answers", file]) == 0
    assert "accuracy 1 (read '7'), own.py:short -6; in all 0.4\n" in capsys.readouterr().out


def test_a_wrong_column_ends_in_exit_code_1_before_anything_is_sampled(here, capsys):
    here(golds=["5"] * 30)
    assert main(["reward", "spec.yaml"]) == 1
    out = capsys.readouterr()
    assert "wrong column: 1" in out.out
    assert "all 30 gold answers are '5'" in out.out
    assert out.err.strip().endswith("fp4rl: 1 fault in 30 gold answers")


def test_golds_that_the_reward_cannot_read_are_named(here, capsys):
    here(reward="choice")
    assert main(["reward", "spec.yaml", "--sample", "0", "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["gold"]["faults"]
    assert {fault["kind"] for fault in faults} == {"unscorable"}
    assert len(faults) == 30


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "none of its 0 rows answers a problem"),
        ('{"prompt": "something else", "completion": "1"}\n', "none of its 1 rows answers a problem"),
        ("[1]\n", "line 1: no object"),
        (None, "no such file"),
    ],
)
def test_answers_that_are_none_are_one_line(content, said, here, capsys):
    folder = here()
    if content is not None:
        (folder / "answers.jsonl").write_text(content)
    assert main(["reward", "spec.yaml", "--answers", "answers.jsonl"]) == 2
    assert said in capsys.readouterr().err


def test_the_models_own_answers_are_drawn_as_a_rollout_draws_them(here, capsys, embedded_model):
    here()
    words = [f"model.path={embedded_model}", "--sample", "3", "--json"]
    assert main(["reward", "spec.yaml", *words]) == 0
    first = json.loads(capsys.readouterr().out)["answers"]
    assert len(first) == 3
    assert all(len(each["completion"]) > 0 for each in first)
    assert main(["reward", "spec.yaml", *words]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == first


TABLE = """
suite: s
seeds: [0]
base:
  task: {name: table, path: data.csv, scorer: math_verify}
  training: {steps: 1, reward: math_verify}
arms: {bf16: {}}
"""


@pytest.fixture
def of_a_table(tmp_path, monkeypatch):
    """A suite over a CSV of fractions, in which each row may be changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(TABLE)

    def write(**changed):
        rows = [[str(i), f"What is x in case {i}?", rf"\frac{{{7 * i % 41 + 1}}}{{43}}"] for i in range(40)]
        for row, answer in changed.items():
            rows[int(row[1:])][2] = answer
        lines = [",".join(row) for row in [["id", "question", "answer"], *rows]]
        (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")

    return write


needs_math = pytest.mark.skipif(not find_spec("math_verify"), reason="extra math")


@needs_math
def test_formulas_of_a_table_are_sound(of_a_table, capsys):
    of_a_table()
    assert main(["reward", "s.yaml", "--sample", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gold"] == {"checked": 40, "faults": [], "notes": []}


@needs_math
def test_gold_answers_that_were_cut_off_are_found_by_their_questions(of_a_table, capsys):
    of_a_table(r5=r"\frac{6}{", r9=r"3\sqrt{2")
    assert main(["reward", "s.yaml", "--sample", "0"]) == 1
    out = capsys.readouterr()
    assert "cut off: 2" in out.out
    assert "'What is x in case 5?'" in out.out
    assert "'What is x in case 9?'" in out.out
    assert "in case 6?" not in out.out


@needs_math
def test_numbers_of_rows_are_no_answers(of_a_table, capsys):
    of_a_table()
    assert main(["reward", "s.yaml", "task.answer=id", "--sample", "0"]) == 1
    assert "the gold answers count up" in capsys.readouterr().out


def test_the_questions_are_no_answers(of_a_table, capsys):
    of_a_table()
    words = ["task.answer=question", "task.scorer=exact", "training.reward=exact"]
    assert main(["reward", "s.yaml", *words, "--sample", "0"]) == 1
    assert "40 gold answers stand in their own questions" in capsys.readouterr().out
