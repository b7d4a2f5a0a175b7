"""Rewards by name, several at once, and code of one's own: values worked out by hand."""

import asyncio
import math
import time

import pytest

from fp4rl.lab.matrix import planned
from fp4rl.rl.inputs import pointed_at
from fp4rl.rl.reward_code import sources
from fp4rl.rl.rewards import Part, Rewarder, reward_named, rewards_of
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import load_spec, parse
from fp4rl.spec.task import Problem, Score
from fp4rl.spec.training import Training


def problem(answer="2", name="p-1"):
    return Problem(name, "Q: 1 + 1 ? A:", answer, "#### 2", "train")


def scorer(asked, text):
    right = text == asked.answer
    return Score(right, right, True)


def rewarded(*parts, texts=("2", "3"), golds=None):
    problems = [problem(gold, f"p-{i}") for i, gold in enumerate(golds or ["2"] * len(texts))]
    return Rewarder(scorer, parts).score(problems, texts, [0.0] * len(texts))


needs_math = pytest.mark.skipif(not __import__("importlib").util.find_spec("math_verify"), reason="extra math")


@needs_math
@pytest.mark.parametrize(
    "gold, completion, expected",
    [
        (r"\frac{1}{2}", "so it is 0.5", 1.0),
        ("0.5", r"so it is $\frac{1}{2}$", 1.0),
        (r"3\sqrt{2}", r"$\sqrt{18}$", 1.0),
        (r"3\sqrt{2}", "3", 0.0),  # a gold answer without dollars is no less than its whole
        (r"11\pi", "#### 11", 0.0),
        ("x^2+1", r"$1 + x^2$", 1.0),
        (r"\left[0,1\right)", "$[0,1)$", 1.0),
        (r"\left[0,1\right)", "$(0,1)$", 0.0),
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", 1.0),
        (r"\boxed{\frac12}", "1/2", 1.0),
        (r"\$18.90", "18.9", 1.0),
        ("1,234", "1234", 1.0),
        ("42", "I do not know", 0.0),
        (r"\{1,2\}", r"\boxed{(1,2)}", 0.0),  # a set is no pair and no interval
        ("(1,2)", r"\boxed{\{1,2\}}", 0.0),
        (r"x \in \{1, 2\}", r"\boxed{\left(1,2\right)}", 0.0),
        (r"\{1,2\}", r"\boxed{1,2}", 1.0),  # a list without brackets may be either
        ("(1,2)", r"\boxed{1,2}", 1.0),
        ("12", r"\boxed{12.}", 1.0),
        (r"\text{June 20}", r"\boxed{June 20}", 1.0),
        (r"\text{June 20}", r"\boxed{June 21}", 0.0),
        (r"\frac{1}{", r"$\frac{1}{$", None),  # cut off: comparable with nothing
        ("", "42", None),
    ],
)
def test_math_verify_reads_a_gold_answer_whole(gold, completion, expected):
    assert reward_named("math_verify")(completion=completion, answer=gold) == expected


@pytest.mark.parametrize(
    "name, pattern, gold, completion, expected",
    [
        ("exact", None, "New York", "New  York\n", 1.0),
        ("exact", None, "New York", "new york", 0.0),
        ("exact", None, "New York", "It is New York", 0.0),
        ("exact", None, " ", "anything", None),
        ("choice", None, "(B)", "The answer is (B).", 1.0),
        ("choice", None, "b", "The answer is (C).", 0.0),
        ("choice", None, "Paris", "The answer is (C).", None),
        ("regex", r"<answer>(.*?)</answer>", "7", "<answer>8</answer> no: <answer> 7 </answer>", 1.0),
        ("regex", r"<answer>(.*?)</answer>", "7", "<answer>7</answer> no: <answer>8</answer>", 0.0),
        ("regex", r"<answer>(.*?)</answer>", "7", "7", 0.0),
        ("regex", r"^<think>", "7", "<think> 8", 1.0),
        ("regex", r"^<think>", "7", "8", 0.0),
    ],
)
def test_a_judge_compares_what_it_reads(name, pattern, gold, completion, expected):
    assert reward_named(name, pattern)(completion=completion, answer=gold) == expected


def test_a_judge_tells_what_it_read():
    assert reward_named("choice").extracted("I think (A), no: (B)") == "B"
    assert reward_named("regex", "#### (.*)").extracted("1\n#### 2") == "2"
    assert reward_named("exact").extracted("  ") is None


def test_several_rewards_are_added_up_with_their_weights_and_logged_apart():
    brief = Part("own.py:brief", lambda completion, **_: -len(completion), 0.1)
    scored = rewarded(Part(weight=2.0), brief, texts=("2", "33"))
    assert scored.earned == pytest.approx((2.0 * 1 - 0.1, 2.0 * 0 - 0.2))
    means = scored.means()
    assert means["reward/mean"] == pytest.approx((1.9 - 0.2) / 2)
    assert (means["reward_part/accuracy"], means["reward_part/own.py.brief"]) == (0.5, -1.5)
    assert not [name for name in rewarded(Part()).means() if name.startswith("reward_part")]


def test_an_answer_that_one_of_several_cannot_judge_has_no_sum():
    scored = rewarded(Part(), Part("mine", lambda completion, **_: None if completion == "3" else 1.0))
    assert scored.earned[0] == 2.0
    assert math.isnan(scored.earned[1])


def test_a_whole_batch_is_judged_at_once_where_a_function_takes_completions():
    calls = []

    def ranks(prompts, completions, answers):
        calls.append((prompts, completions, answers))
        return [float(len(completions) - i) for i in range(len(completions))]

    assert rewarded(Part("mine", ranks), texts=("a", "b", "c")).earned == (3.0, 2.0, 1.0)
    assert calls == [(["Q: 1 + 1 ? A:"] * 3, ["a", "b", "c"], ["2"] * 3)]
    with pytest.raises(CheckFailed, match=r"mine failed on a batch of 2 answers .*p-0.* 1 rewards for 2 answers"):
        rewarded(Part("mine", lambda completions, **_: [1.0]))


def test_async_rewards_of_a_batch_wait_together():
    async def slow(*, completion, answer, **_):
        await asyncio.sleep(0.2)
        if completion == "x":
            raise ValueError("no such answer")
        return float(completion == answer)

    started = time.perf_counter()
    assert rewarded(Part("mine", slow), texts=("2", "3") * 8).earned == (1.0, 0.0) * 8
    assert time.perf_counter() - started < 1.6  # one after another they wait 3.2 s
    with pytest.raises(CheckFailed, match=r"mine failed on problem p-1 .*no such answer"):
        rewarded(Part("mine", slow), texts=("2", "x"))

    async def of_all(*, completions, **_):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    assert rewarded(Part("mine", of_all)).earned == (0.5, 0.5)


OWN = "def short(*, completion, **_):\n    return -len(completion)\n"
SUITE = "suite: s\nseeds: [0]\narms: {a: {training: {reward: 'own.py:short'}}}\n"


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A suite with its own reward beside it, in a folder below the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "s.yaml").write_text(SUITE)
    return folder


def test_a_file_beside_the_suite_is_a_reward(beside):
    experiment = planned(load_spec("suites/s.yaml"))[0].experiment
    assert experiment.training.reward == "suites/own.py:short"
    (part,) = rewards_of(experiment.training)
    assert part.function(completion="four") == -4
    several = load_spec(
        "suites/s.yaml",
        ["arms.a.training={reward: accuracy, rewards: [{name: accuracy}, {name: 'own.py:short', weight: 0.1}]}"],
    )
    assert [each.name for each in planned(several)[0].experiment.training.all_rewards] == [
        "accuracy",
        "suites/own.py:short",
    ]


def test_a_changed_file_is_another_input_and_is_loaded_anew(beside):
    experiment = planned(load_spec("suites/s.yaml"))[0].experiment
    before = pointed_at(experiment)
    assert list(before) == ["reward's source"]
    (beside / "own.py").write_text(OWN.replace("-len", "3 * len"))
    assert pointed_at(experiment) != before
    assert reward_named("suites/own.py:short")(completion="four") == 12
    assert sources("accuracy") == []


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("gone.py:short", NotFoundError, "gone.py does not exist"),
        ("suites/own.py:long", NotFoundError, "has no 'long'"),
        ("suites/own.py:NUMBER", InvalidValueError, "is int, not a function"),
        ("suites/own.py", InvalidValueError, "names a file, but no function in it; write suites/own.py:FUNCTION"),
        (
            "suites/own.py:two",
            InvalidValueError,
            r"takes \(completion, gold\); .*: write \(prompt, completion, answer\)",
        ),
        ("suites/own.py:none", InvalidValueError, r"takes \(\); it is called by name"),
        ("suites/own.py:all", InvalidValueError, r"write \(prompts, completions, answers\)"),
        ("suites/leaves.py:f", InvalidValueError, r"loading it fails \(SystemExit: 3\)"),
        ("suites/broken.py:f", InvalidValueError, r"loading it fails \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_code_that_cannot_be_had_is_one_line(name, kind, said, beside):
    wrong = "def two(completion, gold):\n    pass\ndef none():\n    pass\ndef all(completions):\n    pass\n"
    (beside / "own.py").write_text(OWN + "NUMBER = 3\n" + wrong)
    (beside / "leaves.py").write_text("raise SystemExit(3)\n")
    (beside / "broken.py").write_text("1 / 0\n")
    with pytest.raises(kind, match=said):
        reward_named(name)


@pytest.mark.parametrize(
    "head, body, said",
    [
        ("def f(**_)", "int('x')", r"ValueError: invalid literal .* \(own.py, line 3\)"),
        ("def f(**_)", "json.loads('{')", r"JSONDecodeError: .* \(own.py, line 3\)"),
        ("def f(**_)", "raise SystemExit(3)", r"it called exit \(3\), and must return a number \(own.py, line 3\)"),
        ("def f(completions, **_)", "raise SystemExit(3)", r"a batch of 2 .* called exit \(3\).*\(own.py, line 3\)"),
        ("async def f(**_)", "raise SystemExit(3)", r"called exit \(3\).*\(own.py, line 3\)"),
    ],
)
def test_a_reward_that_raises_or_exits_is_named_with_its_file_and_line(head, body, said, beside):
    (beside / "own.py").write_text(f"import json\n{head}:\n    {body}\n")
    with pytest.raises(CheckFailed, match=said):
        rewarded(Part("mine", reward_named("suites/own.py:f")))


@pytest.mark.parametrize(
    "training, said",
    [
        ({"reward": "regex"}, "regex needs its pattern"),
        ({"rewards": [{"name": "regex"}]}, "regex, which needs one"),
        ({"rewards": [{"name": "exact", "pattern": "x"}]}, "belongs to the reward regex"),
        ({"rewards": [{"name": "regex", "pattern": "("}]}, "no regular expression"),
        ({"rewards": [{"name": "exact", "weight": 0}]}, "weight 0 leaves exact out"),
        ({"rewards": [{"name": "exact"}, {"name": "exact"}]}, "named twice"),
        ({"reward": "exact", "rewards": [{"name": "choice"}]}, "both named"),
    ],
)
def test_rewards_that_contradict_each_other_are_refused(training, said):
    with pytest.raises(InvalidValueError, match=said):
        parse(Experiment, {"training": training}, "")


def test_the_ids_of_runs_with_one_reward_stay():
    assert "rewards" not in Training().model_dump()
    assert digest(Training(reward="math_verify")) == digest({**Training().model_dump(), "reward": "math_verify"})
