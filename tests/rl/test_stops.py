"""An answer ends where its model begins to ask itself another question."""

import pytest
import torch

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.evaluate import answer
from fp4rl.rl.generate import Stops, cut
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.model import Embedded
from fp4rl.tasks import arithmetic
from fp4rl.tasks.arithmetic import Arithmetic
from fp4rl.tasks.gsm8k import Gsm8k

TOKENIZER = build_tokenizer()
SAID = "5 + 2 = 7\n#### 7\n\nQuestion: Ten?\n#### 10"


def tokens(text):
    return TOKENIZER(text)["input_ids"]


def test_an_answer_is_cut_before_the_text_and_counts_as_ended():
    found = cut(TOKENIZER, tokens(SAID), False, ["Question:", "####### "])
    assert found.text == "5 + 2 = 7\n#### 7\n\n"
    assert TOKENIZER.decode(found.tokens) == "5 + 2 = 7\n#### 7\n\nQuestion:"
    assert found.ended


def test_the_first_of_several_texts_ends_it():
    assert cut(TOKENIZER, tokens(SAID), False, ["Question:", "####"]).text == "5 + 2 = 7\n"


@pytest.mark.parametrize("ended", [False, True])
def test_an_answer_without_such_a_text_stays_as_it_is(ended):
    assert cut(TOKENIZER, tokens(SAID), ended, ["Problem:"])[:3] == (tokens(SAID), SAID, ended)
    assert cut(TOKENIZER, tokens(SAID), ended, [])[:3] == (tokens(SAID), SAID, ended)


def test_a_generation_stops_row_by_row_and_never_for_what_the_prompt_holds():
    prompt = tokens("Question:")
    rows = [prompt + tokens("7\n\nQuestion:"), prompt + tokens("7\n\nQuestions")]
    stops = Stops(TOKENIZER, ["Question:"], len(prompt))
    assert stops(torch.tensor(rows), None).tolist() == [True, False]
    assert stops(torch.tensor([row[:-1] for row in rows]), None).tolist() == [False, False]


def test_an_evaluation_scores_and_counts_what_stands_before_the_text():
    """The kind: what a model says after its answer is not its answer, and does not cut it off."""
    torch.manual_seed(0)
    model = build(Embedded(num_layers=1, initializer_range=0.4), TOKENIZER).eval()
    problems = arithmetic.Arithmetic().problems("test", 3)
    plain = answer(model, TOKENIZER, problems, arithmetic.Arithmetic().score, Evaluation(max_new_tokens=24))
    assert all(item.truncated for item in plain)
    stop = TOKENIZER.decode(tokens(plain[1].completion)[6:8])
    stopped = answer(
        model, TOKENIZER, problems, arithmetic.Arithmetic().score, Evaluation(max_new_tokens=24, stop=(stop,))
    )
    for before, after in zip(plain, stopped, strict=True):
        assert after.completion == before.completion.partition(stop)[0]
        assert after.truncated == (stop not in before.completion)
    assert stopped[1].length <= 8


def test_a_task_brings_its_own_ends_where_none_are_named():
    gsm8k = Gsm8k(path="train.jsonl")
    assert Evaluation().for_task(gsm8k).stop == ("Question:",)
    assert Evaluation().for_task(Arithmetic()).stop == ()
    own = Evaluation(stop=())
    assert own.for_task(gsm8k) == own


@pytest.mark.parametrize(
    ("prompt", "stop"),
    [
        ("Question: {question}\nAnswer:", ("Question:",)),
        ("Question: One?\nAnswer: 1\n\nQuestion: {question}\nAnswer:", ("Question:",)),
        ("Solve this.\n{question}\n", ()),
        ("{question}", ()),
    ],
)
def test_what_stands_before_the_question_on_its_line_begins_the_next_one(prompt, stop):
    assert Gsm8k(path="train.jsonl", prompt=prompt).stop == stop


def test_the_limit_of_evaluations_holds_99_percent_of_the_gold_answers_of_gsm8k(shared_data):
    """Even spelled letter by letter, as the embedded tokenizer does; every eighth one tells."""
    task = Gsm8k(path=shared_data / "gsm8k" / "train.jsonl")
    golds = [f" {problem.solution}" for problem in task.problems("train")][::8]
    fit = [len(row) + 1 <= Evaluation().max_new_tokens for row in TOKENIZER(golds)["input_ids"]]
    assert sum(fit) / len(fit) >= 0.99
