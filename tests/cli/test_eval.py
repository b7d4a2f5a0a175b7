"""`fp4rl eval`: what its table says, and that it fits."""

import pytest
from rich.console import Console

from fp4rl.cli.asked_profiles import asked_profiles
from fp4rl.cli.eval import _table
from fp4rl.spec.mistakes import Mistake


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


def test_what_acted_stands_below_where_the_name_does_not_say_it(lines):
    """Kind: the label beside a number says what was described, not what acted."""
    own = {"profile": {"name": "mine", "precision": "w4a4, 3 sites mxfp8"}}
    shown = "\n".join(
        lines(summary("full", 40) | {"profile": {"name": "full", "precision": "full"}}, summary("", 40) | own)
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
    with pytest.raises(Mistake) as caught:
        asked_profiles([word])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
