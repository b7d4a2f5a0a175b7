"""Any text comes back as it was, and a word of the arithmetic task is one token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import BOS, CHARACTERS, EOS, PAD, UNK, build_tokenizer
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import LEVELS, Arithmetic

TOKENIZER = build_tokenizer()


def test_the_vocabulary_is_small_and_its_special_tokens_are_four_different_ones():
    assert len(TOKENIZER) == 143
    special = [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id]
    assert sorted(special) == [0, 1, 2, 3]
    assert TOKENIZER.padding_side == "left"


@pytest.mark.parametrize("difficulty", LEVELS)
def test_every_word_of_the_arithmetic_task_is_one_token_and_a_product_two(difficulty):
    for problem in Arithmetic(difficulty=difficulty).problems("train", 200):
        text = f"{problem.prompt} {problem.solution}"
        assert len(TOKENIZER(text)["input_ids"]) == len(text.split()) + text.count("*")  # a blank and a mark


def test_prompt_and_solution_encode_apart_as_they_do_together():
    problem = Arithmetic().problems("train", 1)[0]
    apart = TOKENIZER(problem.prompt)["input_ids"] + TOKENIZER(f" {problem.solution}")["input_ids"]
    assert apart == TOKENIZER(f"{problem.prompt} {problem.solution}")["input_ids"]


@pytest.mark.parametrize("text", ["2 5", "25", " 2 5", "2  5", "2 . 5", "2.5", " 1 2 3", "12 3"])
def test_digits_decode_to_exactly_what_was_written(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


# "<unk>" spelled out is the token itself, as in every tokenizer of this kind
@given(st.text(alphabet=CHARACTERS, max_size=80).filter(lambda text: not any(s in text for s in (PAD, BOS, EOS, UNK))))
def test_every_text_of_printable_ascii_comes_back_without_an_unknown(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids


def test_a_word_inside_another_word_is_not_cut_out():
    tokens = TOKENIZER.tokenize("x hasty has")
    assert tokens == ["x", " ", "h", "a", "s", "t", "y", " has"]


def test_all_of_gsm8k_encodes_with_at_most_one_unknown_in_a_million_tokens(shared_data):
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::3]
    encoded = TOKENIZER([f"{row['question']}\n{row['answer']}" for row in rows])["input_ids"]
    assert sum(ids.count(TOKENIZER.unk_token_id) for ids in encoded) <= 1
    assert sum(map(len, encoded)) > 1_000_000


def test_typographic_marks_become_the_ascii_they_look_like():
    assert TOKENIZER.decode(TOKENIZER("it’s “5” × 2 – 1½ café £3")["input_ids"]) == 'it\'s "5" * 2 - 11/2 cafe $3'


def test_what_has_no_look_is_one_unknown_a_character():
    assert TOKENIZER.tokenize("a中文") == ["a", "<unk>", "<unk>"]


def test_a_saved_tokenizer_comes_back_the_same_also_beside_a_qwen2_model(tmp_path):
    # AutoTokenizer would replace it by Qwen2Tokenizer here, and split every text otherwise
    build(Embedded(), TOKENIZER).config.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "Q: Tom has 2 3 coins . 2 3 - 1 = 2 2 . #### 2 2"
    assert again(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert (again.pad_token, again.eos_token, again.padding_side) == ("<pad>", "<eos>", "left")


def test_without_the_class_being_pinned_a_qwen2_folder_would_split_the_text_otherwise(tmp_path):
    build(Embedded(), TOKENIZER).config.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["auto_map"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again(" 2 5 .")["input_ids"] != TOKENIZER(" 2 5 .")["input_ids"]
