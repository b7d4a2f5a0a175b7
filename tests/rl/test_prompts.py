"""A prompt that is too long is refused with its name, wherever it is, and none is cut."""

import pytest

from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.check import check
from fp4rl.rl.prompts import require_prompts_fit
from fp4rl.rl.rollout import roll_out
from fp4rl.rl.start import task_of, training_problems
from fp4rl.spec.mistakes import BadValue
from fp4rl.tasks.task import Problem


def problem(prompt, split="train"):
    return Problem(f"id-{len(prompt)}", prompt, "1", "1", split)


def never():
    raise AssertionError("a tokenizer was asked for")


def test_the_longest_prompt_is_named_with_the_length_to_set():
    problems = [problem("1 2"), problem("1" * 12), problem("1" * 20, "test"), problem("1" * 11)]
    tokens = len(build_tokenizer()("1" * 20)["input_ids"])
    assert tokens > 11
    with pytest.raises(
        BadValue, match=rf"3 of 4 prompts .* {tokens} tokens \(test problem id-20, '1+'\); .*={tokens},"
    ) as why:
        require_prompts_fit(problems, 10, build_tokenizer)
    assert "\n" not in str(why.value)
    require_prompts_fit(problems, tokens, build_tokenizer)


def test_nothing_is_counted_where_every_prompt_is_short():
    require_prompts_fit([problem("1" * 10)], 20, never)


def test_a_run_is_refused_before_it_starts_for_what_it_learns_and_for_what_it_is_judged_on(experiment):
    described = experiment("bf16")
    task = task_of(described.task)
    encode, held_out = build_tokenizer(), task.problems("test", 24)
    longest = [
        max(len(encode(p.prompt)["input_ids"]) for p in ps)
        for ps in (training_problems(described.task, task), held_out)
    ]
    check(experiment("bf16", training={"max_prompt_length": max(longest)}))
    with pytest.raises(BadValue, match=f"set training.max_prompt_length={max(longest)}"):
        check(experiment("bf16", training={"max_prompt_length": max(longest) - 1}))


def test_the_rollout_sees_whole_prompts(run, experiment, monkeypatch):
    seen = []

    def spied(model, tokenizer, problems, sampling):
        found = roll_out(model, tokenizer, problems, sampling)
        seen.extend((tokenizer(p.prompt)["input_ids"], ids) for p, ids in zip(problems, found.prompt_ids, strict=True))
        return found

    monkeypatch.setattr("fp4rl.rl.trainer.roll_out", spied)
    run(experiment("bf16", training={"steps": 1}, evaluation={"count": 1, "profiles": ["full"]}))
    assert len(seen) == 16
    assert all(asked == given for asked, given in seen)
