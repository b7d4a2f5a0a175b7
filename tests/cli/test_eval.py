"""`fp4rl eval`: what its table says, and that it fits."""

import pytest
from rich.console import Console

from fp4rl.cli.eval import _table


def summary(name, n, **more):
    return {
        "profile": {"name": name},
        "n": n,
        "strict": 0.3625,
        "flexible": 0.4,
        "formatted": 1.0,
        "mean_length": 31.25,
        **more,
    }


@pytest.fixture
def lines(capsys):
    def show(*summaries):
        Console(width=80).print(_table("models/mine", list(summaries)))
        return capsys.readouterr().out.splitlines()

    return show


def test_several_answers_to_a_problem_count_as_one_trial_and_the_table_says_so(lines):
    shown = "\n".join(lines(summary("full", 80, problems=40, **{"pass@1": 0.36, "pass@2": 0.5})))
    assert "2 answers each" in shown
    assert "n problems as trials" in shown
    assert " 40 " in shown


def test_nothing_is_cut_on_80_columns(lines):
    shown = lines(summary("matmul_noise=0.05", 80, problems=40, **{"pass@1": 0.36, "pass@2": 0.5}))
    assert max(map(len, shown)) <= 80
    assert not any("…" in line for line in shown)
    row = next(line for line in shown if "matmul_noise" in line)
    assert row.split()[-3:] == ["31.2", "36.0", "50.0"]
    assert row.count("[") == row.count("]") == 1


def test_one_answer_a_problem_needs_no_more_words(lines):
    assert "one answer each" in "\n".join(lines(summary("full", 40)))
