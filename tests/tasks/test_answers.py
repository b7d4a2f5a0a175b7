"""Final numbers are read exactly, or not at all."""

import json
import time
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
    [
        *(("27-2", None), ("27 - 2", None), ("27 -2", None), ("(3) - (4)", None), ("x=-2", -2), ("it is = - 2", -2)),
        *(("3,y=4", 4), ("2 and 5.", 5), ("a1b", 1), ("the A-5", 5), ("27 - 2 = 25", 25), ("- 5 eggs", 5)),
    ],
)
def test_a_minus_between_two_numbers_is_no_sign_and_neither_of_them_the_answer(text, number):
    assert flexible_number(text) == number


# What stands after the mark, and the number that it is, by hand; None where it is no number as it stands.
WRITTEN: dict[str, str | None] = {
    # a part of a number is not the number
    **dict.fromkeys(["2 2/3", "12½", "12 ½", "½", "3/4", "-3/4", "18 / 2", r"\frac{1}{2}", r"2\frac{1}{2}", "km/5"]),
    **dict.fromkeys(
        ["10^3", "10^{3}", "2**5", "5 x 4", "5x4", "5 × 4", r"5 \times 4", "5 * -4", "3 · 10^2", "5²", "√16"]
    ),
    **dict.fromkeys(["27-2", "27 - 2", "27 + 2", "(3) - (4)", "$18 - $2", "18 ± 2", "0x1F", "2x", "3π", "9 * 2 = 18"]),
    **dict.fromkeys(["3:20", "3:20 pm", "2020-05-01", "5'11", "5-10", "5–10", "5 to 10", "5 or 6", "1:4"]),
    **dict.fromkeys(
        ["5 million", "3 thousand", "5k", "$1.5M", "5万", "10,00", "1,2,3", "1.2.3", "1.080,50", "1_000", "2 5"]
    ),
    # a number in another notation is one
    "1 080": "1080",
    "1\u202f080": "1080",
    "1{,}080": "1080",
    r"1\,080": "1080",
    "1,080.50": "1080.5",
    "12 345 678": "12345678",
    "3.0e2": "300",
    "3.0E+2": "300",
    "5e-1": "0.5",
    "-2e3": "-2000",
    "1.": "1",
    ".5": "0.5",
    "007": "7",
    # so is a number in the dress of Markdown and LaTeX, with a unit behind it, with any minus
    "**18**": "18",
    "*18*": "18",
    "__18__": "18",
    "`18`": "18",
    "**$18**": "18",
    "**18** 5": "18",
    "(18)": "18",
    "[18]": "18",
    r"\$18": "18",
    r"\$1,080.00": "1080",
    r"18\%": "18",
    "$18$": "18",
    r"\(18\)": "18",
    r"**\$18.50**": "18.5",
    "€18": "18",
    r"\boxed{18}": "18",
    r"$\boxed{-18}$": "-18",
    r"\boxed{\$18}": "18",
    r"\boxed{1{,}080}": "1080",
    r"\text{18 eggs}": "18",
    "- 5": "-5",
    "–5": "-5",
    "−5": "-5",
    "– 5": "-5",
    "- $5": "-5",
    "-$5": "-5",
    "$-5": "-5",
    "**-5**": "-5",
    r"-\boxed{5}": "-5",
    "18 eggs": "18",
    "18kg": "18",
    "18 km/h": "18",
    "18/day": "18",
    "18 (= 9 * 2)": "18",
    "18 = 9 * 2": "18",
    "18!": "18",
    "5 x apples": "5",
    "18 - that is all": "18",
    "3rd": "3",
    "18th of 20": "18",
    "5 million-dollar": None,
    "18, so": "18",
}


@pytest.mark.parametrize(("written", "number"), WRITTEN.items())
def test_after_the_mark_stands_one_whole_number_or_none(written, number):
    """The kind: digits are read together with all that is tied to them; a part of a number is another number."""
    found = strict_number(f"9 - 2 = 7\n#### {written}\n")
    assert (None if found is None else plain(found)) == number


def test_of_the_strings_worked_out_by_hand_enough_are_of_each_kind():
    values = list(WRITTEN.values())
    assert len(values) >= 60
    assert min(values.count(None), len(values) - values.count(None)) >= 30


@pytest.mark.parametrize("written", [written for written, number in WRITTEN.items() if number is None])
def test_a_part_of_a_number_is_not_the_last_number_either(written):
    found = flexible_number(f"Nine less two is 7, and so it is {written}")
    assert found is None or written == "9 * 2 = 18"


# What math-verify 0.9.0 itself takes a part of ("3.0e2" is its 3.0, "18 (= 9 * 2)" its 2), or reads nothing from.
READ_OTHERWISE = {"1\u202f080", r"1\,080", "3.0e2", "5e-1", "-2e3", "18 (= 9 * 2)", "18th of 20", "**18** 5"}
READ_OTHERWISE |= {"*18*", "__18__", "`18`", r"**\$18.50**", r"\text{18 eggs}"}
READ_OTHERWISE |= {"–5", "– 5", "- $5", "-$5", r"-\boxed{5}"}


@pytest.mark.slow  # the import of sympy alone takes 4 s
def test_an_independent_reader_of_answers_finds_the_same_numbers():
    math_verify = pytest.importorskip("math_verify")
    differ = set()
    for written, number in WRITTEN.items():
        readings = [math_verify.parse(text) for text in (written, f"${written.strip('$')}$")]  # as words, as a formula
        if number is not None and not any(math_verify.verify(math_verify.parse(number), found) for found in readings):
            differ.add(written)
    assert differ == READ_OTHERWISE


def test_flexible_reads_nothing_where_there_is_no_number():
    assert flexible_number("no idea") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1\n\nQuestion: Five and two?\nAnswer: 5 + 2 = 7\n#### 7", 1),
        ("#### 1 no, wait\n#### 2", 1),
        ("#### 2 2/3\n\nQuestion: Five and two?\nAnswer: 5 + 2 = 7\n#### 7", None),
        ("#### Step 1: add\n5 + 2 = 7\n#### 7", 7),
        ("#### 1. Add them\n5 + 2 = 7\n#### 2. Say it\n#### 7", 7),
        ("#### 1. Add them", 1),
        ("##### 7", 7),
    ],
)
def test_the_first_answer_after_a_mark_counts_not_a_later_questions(text, number):
    """The kind: a model that goes on to ask itself another question is judged by the answer to the one it was asked."""
    assert strict_number(text) == number
    assert flexible_number(text) == number


@pytest.mark.parametrize(("text", "number"), [("#### 9 * 2 = 18", 18), ("#### x 42", 42), ("####\n42", 42)])
def test_where_nothing_clear_follows_the_mark_the_last_number_is_read(text, number):
    assert strict_number(text) is None
    assert flexible_number(text) == number


@pytest.mark.parametrize("many", ["#", "1", "1 ", "(1)-", "#### ", "####(", r"\frac{", "1   ", "=- ", "#### -"])
def test_reading_takes_a_time_that_grows_with_the_text_alone(many):
    text = many * (40_000 // len(many))
    began = time.process_time()
    strict_number(text)
    flexible_number(f"{text} x")
    assert time.process_time() - began < 5  # 0.1 s; minutes were it quadratic


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
