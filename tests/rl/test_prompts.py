"""A prompt that is too long is refused with its name, wherever it is, and none is cut."""

import json

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fp4rl.engines.rollout.server import VllmServer
from fp4rl.models.load import load, load_tokenizer
from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import BOS, EOS, build_tokenizer
from fp4rl.rl.check import check
from fp4rl.rl.evaluate import answer
from fp4rl.rl.generate import SAMPLERS, Sampling, transformers_sampler
from fp4rl.rl.problems import dropped, problems_of
from fp4rl.rl.prompts import (
    encoded,
    padded,
    require_positions,
    require_prompts_fit,
    template_adds,
    texts,
    token_ids,
)
from fp4rl.rl.rollout import roll_out
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.model import Embedded
from fp4rl.spec.task import Problem, Score
from fp4rl.tasks.gsm8k import Gsm8k
from fp4rl.tasks.table import Table


def problem(prompt, split="train"):
    return Problem(f"id-{len(prompt)}", prompt, "1", "1", split)


def never():
    raise AssertionError("a tokenizer was asked for")


def test_the_longest_prompt_is_named_with_the_length_to_set():
    problems = [problem("1 2"), problem("1" * 12), problem("1" * 20, "test"), problem("1" * 11)]
    tokens = len(build_tokenizer()("1" * 20)["input_ids"])
    assert tokens > 11
    with pytest.raises(
        InvalidValueError, match=rf"3 of 4 prompts .* {tokens} tokens \(test problem id-20, '1+'\); .*={tokens},"
    ) as why:
        require_prompts_fit(problems, 10, build_tokenizer)
    assert "\n" not in str(why.value)
    require_prompts_fit(problems, tokens, build_tokenizer)


def test_nothing_is_counted_where_every_prompt_is_short():
    require_prompts_fit([problem("1" * 10)], 20, never)


def test_a_run_is_refused_before_it_starts_for_what_it_learns_and_for_what_it_is_judged_on(experiment):
    described = experiment("bf16")
    task = described.task
    encode, held_out = build_tokenizer(), task.problems("test", 24)
    longest = [max(len(encode(p.prompt)["input_ids"]) for p in ps) for ps in (task.problems("train"), held_out)]
    check(experiment("bf16", training={"max_prompt_length": max(longest)}))
    with pytest.raises(InvalidValueError, match=f"set training.max_prompt_length={max(longest)}"):
        check(experiment("bf16", training={"max_prompt_length": max(longest) - 1}))


def test_the_rollout_sees_whole_prompts(run, experiment, monkeypatch):
    seen = []

    def spied(sampler, model, tokenizer, problems, sampling):
        found = roll_out(sampler, model, tokenizer, problems, sampling)
        seen.extend((tokenizer(p.prompt)["input_ids"], ids) for p, ids in zip(problems, found.prompt_ids, strict=True))
        return found

    monkeypatch.setattr("fp4rl.rl.trainer.roll_out", spied)
    run(experiment("bf16", training={"steps": 1}, evaluation={"count": 1, "profiles": ["full"]}))
    assert len(seen) == 16
    assert all(asked == given for asked, given in seen)


@pytest.fixture(scope="module")
def opening():
    """A tokenizer that begins every text with its own mark, as Llama's and Gemma's do, and a model for it."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return build(Embedded(num_layers=1), tokenizer), tokenizer


def test_prompts_are_encoded_as_they_stand_padded_on_the_left(opening):
    model, tokenizer = opening
    ids, mask = padded(encoded(model, tokenizer, [problem("1 2"), problem("1")]), tokenizer.pad_token_id)
    one, two, bos, pad = (*tokenizer("1 2")["input_ids"][1:], tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert ids.tolist() == [[bos, one, two], [pad, bos, one]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (f"{BOS}1 2", r"problem id-8 begins with '<bos>' twice .*take that token out of task.prompt"),
        (f"1 2{EOS}", r"problem id-8 ends with '<eos>', before it is answered"),
    ],
)
def test_a_prompt_that_begins_twice_or_is_over_is_refused_wherever_one_is_answered(opening, prompt, message):
    """The kind: a template with a model's own marks; a rollout, an evaluation and the check before a run agree."""
    with pytest.raises(InvalidValueError, match=message):
        encoded(*opening, [problem("1"), problem(prompt)])
    with pytest.raises(InvalidValueError, match=message):
        answer(*opening, [problem(prompt)], lambda *_: Score(False, False, False), Evaluation(max_new_tokens=2))
    with pytest.raises(InvalidValueError, match=message):
        roll_out(transformers_sampler, *opening, [problem(prompt)], Sampling(2, temperature=1.0))


def test_a_token_of_a_prompt_outside_the_embedding_is_named(opening):
    model, _ = opening
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<image>"])
    number = len(tokenizer) - 1
    with pytest.raises(InvalidValueError, match=rf"hold '<image>', token {number} .* ends at {number - 1}"):
        encoded(model, tokenizer, [problem("1"), problem("<image> 1")])


def test_a_run_whose_template_ends_its_prompts_is_refused_before_it_starts(experiment, tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(400)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = experiment("bf16").model_copy(update={"task": Gsm8k(path=str(file), prompt=f"{{question}}{EOS}")})
    with pytest.raises(InvalidValueError, match="ends with '<eos>'"):
        check(described)


def test_answers_beyond_the_positions_of_the_model_are_refused_with_what_would_fit(experiment):
    """A cap on tokens that the model cannot count to; the embedded model has 4,096 positions."""
    with pytest.raises(
        InvalidValueError, match=r"more than the 4096 positions .* set training.max_response_length to 3840"
    ):
        check(experiment("bf16", training={"max_response_length": 3841}))
    with pytest.raises(InvalidValueError, match=r"set evaluation.max_new_tokens to 3840"):
        check(experiment("bf16", evaluation={"max_new_tokens": 3841}))
    check(experiment("bf16", training={"max_response_length": 3840}))


def test_answers_beyond_the_positions_of_the_model_are_refused_before_any_is_made(opening):
    """The kind: learned positions end in an IndexError, rotary ones in noise; the room that is left is named."""
    model, tokenizer = opening
    tokens = len(tokenizer("1" * 9)["input_ids"])
    room = model.config.max_position_embeddings - tokens
    problems = [problem("1" * 9), problem("1")]
    with pytest.raises(InvalidValueError, match=rf"max_new_tokens {room + 1}: .* id-9 takes {tokens}; {room} are left"):
        answer(model, tokenizer, problems, lambda *_: Score(False, False, False), Evaluation(max_new_tokens=room + 1))
    require_positions(model, tokenizer, problems[0], room)


CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A model folder whose tokenizer has a chat template and begins plain texts with its own mark."""
    folder = tmp_path_factory.mktemp("chatting")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model = build(Embedded(num_layers=1), tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(tmp_path, **keys):
    rows = [{"question": f"{n} + 1 ?", "answer": n + 1} for n in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "table", "path": str(tmp_path / "qa.jsonl"), "prompt": "{question} Say it.", **keys}


@pytest.mark.parametrize(
    ("keys", "begins", "ends"),
    [
        ({}, "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ({"system": "Add."}, "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n", "<|im_start|>assistant\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|im_start|>system\nYou", "<think>\n\n</think>\n\n"),
        ({"chat": False}, "", " Say it."),
        ({"chat": False, "system": "Add."}, "Add.\n\n", " Say it."),
    ],
)
def test_the_chat_template_is_applied_once_as_the_folder_has_it(chatting, tmp_path, keys, begins, ends):
    """The oracle is the template's text, written out here."""
    task, tokenizer = Table(**asked(tmp_path, **keys)), load_tokenizer(chatting)
    (first,) = task.problems("test", 1)
    (text,), (ids,) = texts(tokenizer, [first]), token_ids(tokenizer, [first])
    assert text.startswith(begins)
    assert text.endswith(ends)
    assert text.count(f"{first.question} Say it.") == 1
    assert tokenizer.decode(ids) == text
    own = (keys.get("system", "\0"), f"{first.question} Say it.")
    assert "".join(template_adds(tokenizer, first)) == (
        "" if "chat" in keys else text.replace(own[0], "").replace(own[1], "")
    )


def test_a_template_with_a_beginning_of_its_own_does_not_begin_twice(opening, tmp_path):
    _, tokenizer = opening
    (first,) = Table(**asked(tmp_path)).problems("test", 1)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        assert token_ids(tokenizer, [first])[0].count(tokenizer.bos_token_id) == 1
    finally:
        tokenizer.chat_template = None
    assert token_ids(tokenizer, [first])[0].count(tokenizer.bos_token_id) == 1


def test_without_a_template_auto_is_plain_and_true_is_refused(opening, tmp_path):
    _, tokenizer = opening
    (first,) = Table(**asked(tmp_path)).problems("test", 1)
    assert texts(tokenizer, [first]) == [f"{first.question} Say it."]
    (first,) = Table(**asked(tmp_path, chat=True)).problems("test", 1)
    with pytest.raises(InvalidValueError, match=r"task.chat: true, and the .* has no chat template; put"):
        texts(tokenizer, [first])


def test_what_a_template_refuses_is_one_line_with_the_cure(chatting, tmp_path):
    tokenizer = load_tokenizer(chatting)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    (first,) = Table(**asked(tmp_path, system="Add.")).problems("test", 1)
    with pytest.raises(InvalidValueError, match=r"problem \(System role not supported\); leave out task.system"):
        texts(tokenizer, [first])


def test_the_prompt_limit_counts_what_a_template_adds(chatting, tmp_path):
    tokenizer = load_tokenizer(chatting)
    (first,) = Table(**asked(tmp_path)).problems("test", 1)
    tokens = len(token_ids(tokenizer, [first])[0])
    assert tokens > len(tokenizer(first.prompt)["input_ids"]) + 20
    require_prompts_fit([first], tokens, lambda: tokenizer)
    with pytest.raises(InvalidValueError, match=f"the longest has {tokens} tokens"):
        require_prompts_fit([first], tokens - 1, lambda: tokenizer)


def test_training_evaluation_and_a_server_are_asked_the_same_tokens(run, experiment, chatting, tmp_path, monkeypatch):
    """The kind: a template applied in one place and not in another makes sampler, trainer and judge three tasks."""
    seen = {"rollout": [], "evaluation": []}

    def spied(model, tokenizer, prompts, sampling):
        seen["rollout" if sampling.logps else "evaluation"] += prompts
        return transformers_sampler(model, tokenizer, prompts, sampling)

    monkeypatch.setitem(SAMPLERS, "transformers", lambda _: spied)
    described = experiment("bf16", training={"steps": 1}, evaluation={"count": 1, "profiles": ["full"]})
    task, path = Table(**asked(tmp_path, few_shot=1)), {"path": str(chatting)}
    described = described.model_copy(update={"task": task, "model": described.model.__class__.model_validate(path)})
    run(described)
    tokenizer = AutoTokenizer.from_pretrained(chatting)
    by_hand = {
        split: [
            tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in p.chat.messages],
                add_generation_prompt=True,
                return_dict=False,
            )
            for p in task.problems(split)
        ]
        for split in ("train", "test")
    }
    posted, served = [], VllmServer("http://127.0.0.1:1")
    monkeypatch.setattr(served.server, "post", lambda _, **content: posted.append(content["token_ids"]))
    for ids in encoded(*load(chatting), task.problems("train")):
        served._generate(ids, {})
    assert posted == by_hand["train"]
    assert seen["evaluation"][0] == by_hand["test"][0]
    assert len(seen["rollout"]) == 16
    assert all(ids in by_hand["train"] for ids in seen["rollout"])


def test_prompts_over_the_limit_are_left_out_of_training_and_evaluation_and_counted(run, experiment, tmp_path):
    """The kind: what is dropped must be dropped everywhere, and said; the ids that remain are known from the file."""
    rows = [{"question": f"{n} + 1 ?" + " Think." * (10 if n % 4 == 0 else 0), "answer": n + 1} for n in range(60)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Table(path=str(tmp_path / "qa.jsonl"), prompt="{question}")
    recipe = {"steps": 1, "max_prompt_length": 30, "filter_overlong_prompts": True}
    described = experiment("bf16", training=recipe, evaluation={"count": 2, "profiles": ["full"]})
    described = described.model_copy(update={"task": task})
    short = [p for p in task.problems("train") if "Think" not in p.prompt]
    assert problems_of(described, "train") == tuple(short)
    assert all("Think" not in p.prompt for p in problems_of(described, "test", 2))
    everything = task.problems("train")
    counts = f"{len(everything) - len(short)} of {len(everything)}"
    assert dropped(described) == f"{counts} training prompts have more than 30 tokens and are left out"
    _, heard = run(described)
    assert dropped(described) in heard.lines
    with pytest.raises(InvalidValueError, match=r"training\.max_prompt_length 30"):
        check(
            described.model_copy(
                update={"training": described.training.model_copy(update={"filter_overlong_prompts": False})}
            )
        )


def test_rollouts_end_at_the_texts_of_the_recipe(run, experiment, monkeypatch):
    seen = []

    def spied(model, tokenizer, prompts, sampling):
        seen.append((sampling.logps, sampling.stop))
        return transformers_sampler(model, tokenizer, prompts, sampling)

    monkeypatch.setitem(SAMPLERS, "transformers", lambda _: spied)
    run(experiment("bf16", training={"steps": 1, "stop": ["####"]}, evaluation={"count": 1, "profiles": ["full"]}))
    assert {stop for is_rollout, stop in seen if is_rollout} == {("####",)}
    assert {stop for is_rollout, stop in seen if not is_rollout} == {()}
