"""Final numbers are read exactly, or not at all."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.tasks.answers import flexible_number, plain, same_number, strict_number


def golds(shared_data: Path) -> list[tuple[str, str]]:
    """(answer text, the characters after its mark) of every row."""
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["answer"] for line in lines]
    return [(text, text.split("####")[1].strip()) for text in texts]


def test_all_7473_golds_of_gsm8k_are_reproduced(shared_data):
    rows = golds(shared_data)
    assert len(rows) == 7473
    wrong = [gold for text, gold in rows if strict_number(text) != Decimal(gold.replace(",", ""))]
    assert wrong == []


def test_the_golds_hold_79_with_commas_and_3_negative_ones_and_each_is_the_last_number_too(shared_data):
    rows = golds(shared_data)
    assert sum("," in gold for _, gold in rows) == 79
    assert sum((strict_number(text) or 0) < 0 for text, _ in rows) == 3
    assert all(flexible_number(text) == strict_number(text) for text, _ in rows)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("42", "42"),
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("+7", "7"),
        ("$18", "18"),
        ("-$18", "-18"),
        ("$-18", "-18"),
        ("$1,000.", "1000"),
        ("3.", "3"),
        ("3.50", "3.5"),
        (".5", "0.5"),
        ("50%", "50"),
        ("12 dollars", "12"),
        ("007", "7"),
        ("0.1", "0.1"),
        ("100000000000000000000000001", "100000000000000000000000001"),
    ],
)
def test_a_number_reads_the_same_after_the_mark_and_at_the_end_of_a_sentence(written, number):
    assert strict_number(f"so it is\n#### {written}") == Decimal(number)
    assert strict_number(f"####{written}\n") == Decimal(number)
    assert flexible_number(f"first 99, then we get {written}") == Decimal(number)


@pytest.mark.parametrize(
    "text", ["", "42", "#### ", "#### x 42", "####\n42", "#### 10,00", "#### 3/4", "#### 1,2,3", "### 4"]
)
def test_strict_reads_nothing_where_no_clear_number_follows_the_mark(text):
    assert strict_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("27-2", 2), ("27 - 2", 2), ("x=-2", -2), ("(3) - (4)", 4), ("3,y=4", 4), ("2 and 5.", 5), ("a1b", 1)],
)
def test_a_minus_between_two_numbers_is_no_sign(text, number):
    assert flexible_number(text) == number


def test_flexible_reads_nothing_where_there_is_no_number():
    assert flexible_number("no idea") is None


def test_the_last_mark_counts():
    assert strict_number("#### 1 no, wait\n#### 2") == 2


def test_a_missing_number_equals_nothing_not_even_another_missing_one():
    assert not same_number(None, None)
    assert not same_number(Decimal(0), None)


def test_comparison_is_exact_where_floats_are_not():
    assert same_number(strict_number("#### 2.50"), strict_number("#### 2.5"))
    assert float("0.30000000000000001") == float("0.3")
    assert not same_number(strict_number("#### 0.30000000000000001"), strict_number("#### 0.3"))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_number_written_out_is_read_back(number):
    assert strict_number(f"#### {number:f}") == number
    assert strict_number(f"#### {number:,f}") == number
    assert strict_number(f"#### {plain(number)}") == number
    assert flexible_number(f"it is {number:,f}.") == number
