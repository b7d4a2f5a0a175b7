"""The letter that an answer chooses: each row was read by hand."""

import string

import pytest

from fp4rl.tasks.choice import chosen, letter

WRITTEN = [
    ("#### B", "B"),
    (r"so \boxed{B}", "B"),
    (r"so $\boxed{\text{(B)}}$.", "B"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("The correct answer is (B) Paris, since it is the capital.", "B"),
    ("the answer is option B.", "B"),
    ("The final answer is: B", "B"),
    ("<answer>B</answer>", "B"),
    ("(A) is wrong, (C) too. Answer: B: Paris", "B"),
    ("Answer: A\nNo, wait.\nAnswer: B", "B"),  # the last marked one
    ("The answer is B. As for (C), it is a city too.", "B"),  # a mark wins over what is mentioned later
    ("B", "B"),
    ("  B.  ", "B"),
    ("B. Paris", "B"),
    ("B) Paris", "B"),
    ("It is **B**", "B"),
    ("Not (A), hence (B)", "B"),  # the last one mentioned
    ("Reasoning first.\nB", "B"),
    ("(A), (B) and (C) are wrong, so (D)", "D"),
    ("The correct option is B", "B"),
    ("The best choice is: B.", "B"),
    ("**Option:** B", "B"),
    (r"so \boxed B", "B"),
    ("(B), as f(x) is even", "B"),
    ("P(A) is small, hence (B)", "B"),
    ("B. As in (b) above", "B"),  # a capital that stands as a choice wins over a small letter
    # small letters
    ("Answer: b", "B"),
    ("Answer: (b)", "B"),
    ("#### b", "B"),
    (r"\boxed{b}", "B"),
    ("<answer>b</answer>", "B"),
    ("the answer is b.", "B"),
    ("the correct option is (b)", "B"),
    ("The answer is: b", "B"),
    ("(b)", "B"),
    ("b)", "B"),
    ("b) Paris", "B"),
    ("**b**", "B"),
    ("b", "B"),
    ("Not (a), hence (b)", "B"),
    # none
    ("The answer is a", None),  # of a sentence that was cut off, for all one knows
    ("The answer is a city", None),
    ("Answer: a city", None),
    ("f(x) = a", None),
    ("apple(s)", None),
    ("Answer: a or b", None),
    ("Answer: b/c", None),
    ("(a) or (b)", None),
    ("The correct option is B or C", None),
    ("The correct option is not B", None),
    ("P(A) is small", None),
    ("Answer: e.g. Paris", None),
    ("", None),
    ("Paris", None),
    ("A dog barks, I think.", None),
    ("Answer: A dog", None),
    ("Answer: B or C", None),
    ("Answer: (A), (B)", None),
    ("The answer is B/C", None),
    ("The answer is not clear", None),
    ("The answer is U.S. law", None),
    ("Answer: Because", None),
    ("(A) or (B)", None),
]


@pytest.mark.parametrize("text, expected", WRITTEN)
def test_a_choice_is_read_as_it_is_written_or_not_at_all(text, expected):
    assert chosen(text) == expected


def test_no_letter_is_favoured():
    """Kind: `A` and `I` are words, so a reader that forgives one letter more than another biases the accuracy."""
    for text, _ in WRITTEN:
        only = [found for found in "ABC" if f"{found}" in text]
        if only != ["B"]:
            continue
        for other in string.ascii_uppercase:
            if other not in text:
                moved = text.replace("B", other)
                assert chosen(moved) == (other if chosen(text) else None), moved


@pytest.mark.parametrize(
    "gold, expected",
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B) Paris", "B"), (" B ", "B"), ("[C]", "C")),
        *(("Paris", None), ("A dog", None), ("3", None), ("", None)),
    ],
)
def test_a_gold_letter_is_read_in_each_of_its_forms(gold, expected):
    assert letter(gold) == expected
