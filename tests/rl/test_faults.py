"""What breaks in data, rewards and generation ends in one line that names the place, or is logged and survived."""

import json
import math

import pytest
import torch

from fp4rl.lab.matrix import single
from fp4rl.lab.work import execute_run
from fp4rl.models.load import load
from fp4rl.models.positions import forward_inputs
from fp4rl.rl.check import check
from fp4rl.rl.generate import Generation
from fp4rl.rl.prompts import padded
from fp4rl.rl.rewards import Part, Rewarder, reward_named
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError
from fp4rl.spec.task import Problem, Score

PROBLEM = Problem("arithmetic-1", "Q: 1 + 1 ? A:", "2", "1 + 1 = 2 . #### 2", "train")
WRONG = Score(False, False, False)


def reward(function, **words):
    return Rewarder(lambda problem, text: WRONG, (Part("my.reward", function),), **words)


def raising(**_):
    raise ZeroDivisionError("division by zero")


def test_a_reward_that_raises_names_itself_the_problem_and_the_error():
    with pytest.raises(CheckFailed, match=r"my\.reward failed on problem arithmetic-1 .*ZeroDivisionError") as caught:
        reward(raising).score([PROBLEM], ["2"], [0.0])
    assert "\n" not in str(caught.value)


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(CheckFailed, match="arithmetic-1"):
        reward(lambda **_: "good").score([PROBLEM], ["2"], [0.0])


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_an_answer_that_cannot_be_judged_takes_no_part_and_is_said_once(nothing):
    said = []
    scored = reward(lambda completion, **_: nothing if completion == "?" else 1.0, say=said.append).score(
        [PROBLEM] * 4, ["?", "2", "?", "2"], [0.0] * 4
    )
    assert [math.isnan(r) for r in scored.rewards] == [True, False, True, False]
    assert scored.means()["reward/mean"] == 1.0
    assert scored.means()["reward/unjudged"] == 0.5
    assert len(said) == 1
    assert "arithmetic-1" in said[0]


def test_a_reward_that_judges_nothing_stops_the_run():
    with pytest.raises(CheckFailed, match="judged none of 2 answers"):
        reward(lambda **_: None).score([PROBLEM] * 2, ["1", "2"], [0.0] * 2)


def half_judged(*, completion, answer, **_):
    """A reward of one's own, by dotted path; it cannot judge answers of an odd number of words."""
    words = len(completion.split())
    return None if words % 2 else words / 100


@pytest.fixture
def own_reward(monkeypatch):
    """`half_judged` under a path that can be imported."""
    import sys
    import types

    module = types.ModuleType("rewards_of_mine")
    module.half_judged = half_judged
    module.number = 3
    monkeypatch.setitem(sys.modules, "rewards_of_mine", module)
    return "rewards_of_mine.half_judged"


def test_a_run_learns_from_a_python_function_that_cannot_judge_everything(own_reward, run, experiment):
    _, heard = run(experiment("bf16", training={"reward": own_reward}))
    metrics = heard.steps[0][1]
    assert 0 < metrics["reward/unjudged"] < 1
    assert math.isfinite(metrics["policy_loss"])
    assert metrics["grad_norm"] > 0
    assert {"accuracy/rollout", "accuracy/rollout_flexible", "accuracy/rollout_format"} <= metrics.keys()


@pytest.mark.parametrize(
    "name, kind, said",
    [
        ("accuracyy", InvalidValueError, "package.module.function"),
        ("no_such_module.reward", NotFoundError, "PYTHONPATH"),
        ("rewards_of_mine.missing", NotFoundError, "has no 'missing'"),
        ("rewards_of_mine.number", InvalidValueError, "not a function"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_before_anything_runs(name, kind, said, own_reward, experiment):
    with pytest.raises(kind, match=said):
        check(experiment("bf16", training={"reward": name}))


def test_math_verify_judges_by_meaning_or_says_what_to_install():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(NotFoundError, match=r"fp4rl\[math\]"):
            reward_named("math_verify")
    else:
        judge = reward_named("math_verify")
        assert judge(completion=r"so it is $\frac{1}{2}$", answer="0.5")
        assert not judge(completion="$3$", answer="0.5")


def test_a_row_without_an_answer_is_named_before_anything_runs(tmp_path, experiment):
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    rows[7]["answer"] = "I do not know"
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = experiment("bf16").model_copy(update={"task": _gsm8k(file)})
    with pytest.raises(InvalidValueError, match=r"data\.jsonl, line 8: the answer has no final number"):
        execute_run(single(described, "trial"), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def _gsm8k(file):
    from fp4rl.tasks.gsm8k import Gsm8k

    return Gsm8k(path=str(file))


def test_a_tokenizer_without_a_chat_template_trains(run, experiment, start_folder):
    """Its prompts go in as they are written, and its steps move the weights that its folder then holds."""
    trained, heard = run(experiment("bf16"))
    model, tokenizer = load(trained.final)
    start, _ = load(start_folder)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start.get_parameter(name))]
    assert tokenizer.chat_template is None
    assert trained.steps_done == len(heard.steps) == 2
    assert any(metrics["grad_norm"] > 0 for _, metrics in heard.steps)
    assert len(moved) > 14


def test_empty_answers_are_counted_and_survived(run, experiment, monkeypatch):
    """Every answer ends at once: nothing but the end token."""

    @torch.no_grad()
    def ending(model, tokenizer, prompts, sampling):
        inputs = forward_inputs(model, *(x.to(model.device) for x in padded(prompts, tokenizer.pad_token_id)))
        logps = (model(**inputs).logits[:, -1] / sampling.temperature).log_softmax(-1)[:, [tokenizer.eos_token_id]]
        return [Generation([tokenizer.eos_token_id], "", True, row) for row in logps]

    monkeypatch.setattr("fp4rl.rl.session.sampler_named", lambda _: ending)
    _, heard = run(experiment("bf16"))
    assert [metrics["response_length/empty_ratio"] for _, metrics in heard.steps] == [1.0, 1.0]
    assert all(math.isfinite(value) for _, metrics in heard.steps for value in metrics.values())
