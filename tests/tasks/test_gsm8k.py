"""GSM8K is read from local files, and what is wrong with a file is said in one line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fp4rl.spec.errors import InvalidValueError, NotFoundError, UserError
from fp4rl.spec.task import SPLITS
from fp4rl.tasks.gsm8k import Gsm8k
from fp4rl.tasks.overlap import check_disjoint

ROW = {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}


def written(folder: Path, *lines: object, name: str = "some.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def read_all(path: Path) -> None:
    Gsm8k(path=path).problems("train")


def test_the_real_file_is_read_whole_and_cut_into_three_disjoint_splits(shared_data):
    task = Gsm8k(path=shared_data / "gsm8k" / "train.jsonl")
    train, validation, test = (task.problems(split) for split in SPLITS)
    assert len(train) + len(validation) + len(test) == 7473
    assert len({p.id for p in (*train, *validation, *test)}) == 7473
    assert 650 < len(validation) < 850
    assert 650 < len(test) < 850
    check_disjoint(task, train, (*validation, *test))


def test_every_gold_solution_of_the_real_file_scores_in_full(shared_data):
    task = Gsm8k(path=shared_data / "gsm8k" / "train.jsonl")
    scores = [task.score(problem, problem.solution) for split in SPLITS for problem in task.problems(split)]
    assert all(score.strict and score.flexible and score.formatted for score in scores)


def test_a_question_keeps_its_split_whatever_else_the_file_holds(tmp_path, shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    whole = Gsm8k(path=shared_data / "gsm8k" / "train.jsonl")
    splits = {problem.id: split for split in SPLITS for problem in whole.problems(split)}
    part = Gsm8k(path=written(tmp_path, *lines[100:160][::-1]))
    assert all(splits[problem.id] == split for split in SPLITS for problem in part.problems(split))


def test_a_question_in_other_letters_and_marks_stays_in_its_split(tmp_path):
    rows = [{"question": f"Is {n} plus two more than ten?", "answer": f"#### {n}"} for n in range(60)]
    loud = [{**row, "question": row["question"].upper().replace("?", " ...")} for row in rows]
    one, two = (Gsm8k(path=written(tmp_path, *some, name=f"{len(some[0]['question'])}.jsonl")) for some in (rows, loud))
    for split in SPLITS:
        assert [p.answer for p in one.problems(split)] == [p.answer for p in two.problems(split)] != []


def test_a_row_becomes_a_problem_with_a_plain_answer(tmp_path):
    path = written(tmp_path, ROW)
    (problem,) = Gsm8k(path=path, test_path=path, prompt="Ask: {question} {{say}}").problems("test")
    assert problem.prompt == "Ask: Two and two? {{say}}"
    assert problem.answer == "1004"
    assert problem.solution == ROW["answer"]


def test_with_a_test_file_nothing_of_the_training_file_is_left_out_of_train_and_validation(tmp_path, shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    task = Gsm8k(path=written(tmp_path, *lines), test_path=written(tmp_path, ROW, name="test.jsonl"))
    assert len(task.problems("train")) + len(task.problems("validation")) == 200
    assert [problem.answer for problem in task.problems("test")] == ["1004"]


def test_parquet_and_jsonl_hold_the_same_problems(tmp_path):
    jsonl, parquet = written(tmp_path, ROW), tmp_path / "some.parquet"
    pq.write_table(pa.Table.from_pylist([ROW]), parquet)
    one, two = (Gsm8k(path=path, test_path=path).problems("test") for path in (jsonl, parquet))
    assert one == two


def test_asking_for_more_problems_than_there_are_names_the_file_and_both_counts(tmp_path):
    path = written(tmp_path, ROW)
    with pytest.raises(InvalidValueError, match=r"test split of .*some.jsonl has 1 problems, not 2"):
        Gsm8k(path=path, test_path=path).problems("test", 2)


def test_a_file_that_does_not_exist_is_named_with_the_cure(tmp_path):
    with pytest.raises(NotFoundError, match=r"'.*gone.jsonl' does not exist; give the path of a local"):
        Gsm8k(path=tmp_path / "gone.jsonl").problems("train")
    with pytest.raises(NotFoundError, match=r"gone\.jsonl"):
        Gsm8k(path=written(tmp_path, ROW), test_path=tmp_path / "gone.jsonl").problems("train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "?", "answers": "#### 1"}, r"line 2: no column 'answer'; did you mean 'answers'\?"),
        ({"question": "?", "answer": "It is 4."}, r"line 2: the answer has no final number after '####'"),
        ({"question": "?", "answer": "#### four"}, r"line 2: the answer has no final number after '####'"),
        ({"question": 3, "answer": "#### 4"}, r"line 2: 'question' is int, not text"),
        ("{'question': 3}", r"line 2: not JSON"),
        ("[1]", r"line 2: no object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_with_the_cure(tmp_path, line, message):
    with pytest.raises(UserError, match=r"some.jsonl, " + message) as caught:
        read_all(written(tmp_path, ROW, line))
    assert "\n" not in str(caught.value)


def test_a_parquet_without_the_column_and_a_file_that_is_no_parquet_are_named(tmp_path):
    pq.write_table(pa.table({"question": ["?"], "reply": ["#### 1"]}), tmp_path / "a.parquet")
    with pytest.raises(NotFoundError, match=r"a.parquet, row 1: no column 'answer'"):
        read_all(tmp_path / "a.parquet")
    with pytest.raises(InvalidValueError, match=r"b.parquet: not a Parquet file"):
        read_all(written(tmp_path, "no", name="b.parquet"))


def test_an_unknown_kind_of_file_is_a_clear_mistake(tmp_path):
    with pytest.raises(InvalidValueError, match=r"'.xlsx'; give a .jsonl, .json, .csv, .tsv or .parquet file"):
        read_all(written(tmp_path, ROW, name="some.xlsx"))


def test_an_empty_file_is_a_clear_mistake(tmp_path):
    with pytest.raises(InvalidValueError, match=r"some.jsonl holds no rows"):
        read_all(written(tmp_path, ""))


def test_a_prompt_without_a_place_for_the_question_is_a_clear_mistake(tmp_path):
    with pytest.raises(ValueError, match="no place for the question"):
        Gsm8k(path=written(tmp_path, ROW), prompt="Question: {q}")


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    """The kind: text as editors of other systems write it; read where it says what it is, else one line."""
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(ROW)}\r\n".encode())
    assert [problem.answer for problem in Gsm8k(path=path, test_path=path).problems("test")] == ["1004"]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r"some.jsonl, line 1: UTF-16, not UTF-8; save the file again as UTF-8"),
        ("latin-1", r"some.jsonl, line 2: byte 0xe9 is not UTF-8 \(Latin-1\?\); save the file as UTF-8"),
    ],
)
def test_text_in_another_encoding_is_one_line_with_the_cure(tmp_path, encoding, message):
    path = tmp_path / "some.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in (ROW, {**ROW, "question": "A café?"})]
    path.write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(InvalidValueError, match=message) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "\\ud800", "answer": "#### 1"}', r"line 1: 'question' holds half of a character"),
        ('{"question": "?", "answer": %s}' % ("9" * 5000), r"line 1: not JSON \(Exceeds the limit"),
        ("[" * 100_000, r"line 1: not JSON \(maximum recursion depth"),
    ],
)
def test_what_no_file_means_to_hold_is_one_line_too(tmp_path, line, message):
    with pytest.raises(InvalidValueError, match=message):
        read_all(written(tmp_path, line))


def test_a_question_that_is_held_out_twice_is_named_by_both_its_lines(tmp_path):
    """The kind: a repeated problem counts twice and makes the interval too narrow."""
    again = {"question": "two  AND two", "answer": "#### 4"}
    path = written(tmp_path, ROW, {"question": "Three?", "answer": "#### 3"}, again)
    with pytest.raises(
        InvalidValueError, match=r"line 3: asks what .*some.jsonl, line 1 asks .*1 of 3 held-out problems are"
    ):
        Gsm8k(path=written(tmp_path, ROW, name="train.jsonl"), test_path=path).problems("test")


def test_a_question_that_is_trained_on_twice_is_no_fault(tmp_path):
    rows = [{"question": f"Is {n} plus two more than ten?", "answer": f"#### {n}"} for n in range(9)]
    (seldom,) = (row for row in rows if "4 plus" in row["question"])
    task = Gsm8k(path=written(tmp_path, *rows, seldom, seldom), test_path=written(tmp_path, ROW, name="test.jsonl"))
    assert [problem.answer for problem in task.problems("train")].count("4") == 3
