"""Any table of questions and answers is a task: its kinds of files, its columns, and what the model sees of a row."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError, NotFoundError, UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.task import SPLITS
from fp4rl.tasks.gsm8k import Gsm8k
from fp4rl.tasks.rows import UnscorableError
from fp4rl.tasks.table import Table

ROWS = [{"q": f"What is {n} plus, say, {n}?\nTell me.", "a": str(2 * n)} for n in range(60)]
COLUMNS = {"question": "q", "answer": "a"}


def as_csv(rows, delimiter=",", end="\n"):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def table(folder: Path, content: bytes, name: str = "qa.jsonl", **keys) -> Table:
    (folder / name).write_bytes(content)
    return Table(path=str(folder / name), **keys)


def everything(task):
    return [(p.split, p.question, p.answer, p.prompt) for split in SPLITS for p in task.problems(split)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qa.csv", as_csv(ROWS)),
        ("qa.CSV", as_csv(ROWS, end="\r\n")),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(ROWS, end="\r\n")),
        ("excel.csv", as_csv(ROWS, ";")),
        ("qa.tsv", as_csv(ROWS, "\t")),
        ("qa.csv.gz", gzip.compress(as_csv(ROWS))),
        ("qa.jsonl.gz", gzip.compress(as_jsonl(ROWS))),
        ("crlf.jsonl", b"\xef\xbb\xbf" + as_jsonl(ROWS).replace(b"\n", b"\r\n")),
        ("list.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        ("lines.json", as_jsonl(ROWS)),
        ("qa.parquet", as_parquet(ROWS)),
        ("qa.parquet.gz", gzip.compress(as_parquet(ROWS))),
        ("numbers.parquet", as_parquet([{**row, "a": int(row["a"])} for row in ROWS])),
        ("floats.jsonl", as_jsonl([{**row, "a": float(row["a"])} for row in ROWS])),
    ],
)
def test_the_same_rows_are_the_same_problems_in_every_kind_of_file(tmp_path, name, content):
    read = everything(table(tmp_path, content, name, **COLUMNS))
    assert sorted((question, answer) for _, question, answer, _ in read) == sorted((r["q"], r["a"]) for r in ROWS)
    assert read == everything(table(tmp_path, as_jsonl(ROWS), "plain.jsonl", **COLUMNS))
    assert all(question in prompt and '"####"' in prompt for _, question, _, prompt in read)


def test_the_line_of_a_csv_row_is_that_of_the_file_whatever_its_cells_hold(tmp_path):
    """A cell of two lines moves the rows below it: an editor must find the line that a message names."""
    rows = [*ROWS[:3], {"q": "Four?", "a": "four"}]
    with pytest.raises(InvalidValueError, match=r"qa.csv, line 8: the answer has no final number after '####'"):
        everything(table(tmp_path, as_csv(rows), "qa.csv", **COLUMNS))


def test_the_first_wrong_row_is_named_with_the_number_of_others_and_the_verb_that_names_them(tmp_path):
    rows = [*ROWS[:3], {"q": "Four?", "a": "four"}, {"q": "Five?", "a": ""}, {"q": "Six?", "a": "six"}]
    told = r"line 4: the answer has no final number .*\(and 2 more rows: `fp4rl data` names each\)$"
    with pytest.raises(UnscorableError, match=told):
        everything(table(tmp_path, as_jsonl(rows), **COLUMNS))


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"q,a\n1 + 1?,2,3\n", "a.csv", r"line 2: 3 cells below 2 columns; quote the cell"),
        (b"q,a\n1 + 1?,\n", "a.csv", r"line 2: 'a' is empty; fill it in"),
        (b'q,a\n"1 + 1?,2\n', "a.csv", r"line 2: not CSV \(unexpected end of data\)"),
        (b"q,reply\n1 + 1?,2\n", "a.csv", r"line 2: no column 'a'; known: q, reply"),
        (as_jsonl([{"q": "?", "a": ""}]), "a.jsonl", r"line 1: 'a' is empty"),
        (as_jsonl([{"q": " ", "a": "1"}]), "a.jsonl", r"line 1: 'q' is empty"),
        (as_jsonl([{"q": "?", "a": None}]), "a.jsonl", r"line 1: 'a' is empty"),
        (as_jsonl([{"q": "?", "a": True}]), "a.jsonl", r"line 1: 'a' is bool, not text or a number"),
        (as_jsonl([{"q": "?", "a": "4 apples and 3 pears"}]), "a.jsonl", r"line 1: the answer has no final number"),
        (b"q,a\n1 + 1?,2\n"[:9], "a.csv.gz", r"not a whole gzip file \(Not a gzipped file"),
        (gzip.compress(as_csv(ROWS))[:-30], "a.csv.gz", r"not a whole gzip file"),
        ("q,a\nÄ?,2\n".encode("utf-16"), "a.csv", r"line 1: UTF-16, not UTF-8"),
        (b"q,a\n", "a.csv", r"holds no rows; give a file with the columns q and a"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_place_and_the_cure(tmp_path, content, name, message):
    with pytest.raises(UserError, match=message) as caught:
        everything(table(tmp_path, content, name, **COLUMNS))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "gold", "solution"),
    [
        (18, "18", "#### 18"),
        ("1,080", "1080", "1,080\n#### 1080"),
        (2.50, "2.5", "#### 2.5"),
        ("-3", "-3", "#### -3"),
        ("18 eggs", "18", "18 eggs\n#### 18"),
        ("She has 3 + 4.\n#### 7", "7", "She has 3 + 4.\n#### 7"),
    ],
)
def test_a_bare_number_is_an_answer_and_becomes_a_solution_that_scores(tmp_path, answer, gold, solution):
    task = table(tmp_path, as_jsonl([{"question": "How many?", "answer": answer}]), test_path=tmp_path / "qa.jsonl")
    (problem,) = task.problems("test")
    assert (problem.answer, problem.solution) == (gold, solution)
    assert task.score(problem, problem.solution).strict


def test_rows_are_chosen_by_a_filter_and_split_by_a_column(tmp_path):
    rows = [
        {"question": f"{n}?", "answer": n, "level": n % 3, "part": ["Train", "dev", "test"][n % 7 % 3]}
        for n in range(60)
    ]
    task = table(tmp_path, as_jsonl(rows), split="part", filter={"level": [1, 2], "part": ["Train", "test"]})
    kept = [row for row in rows if row["level"] in (1, 2) and row["part"] != "dev"]
    for split, name in (("train", "Train"), ("test", "test"), ("validation", "dev")):
        assert [p.answer for p in task.problems(split)] == [str(r["answer"]) for r in kept if r["part"] == name]
    with pytest.raises(InvalidValueError, match=r"line 1: 'level' is 0; write train, validation or test"):
        everything(task.model_copy(update={"split": "level", "filter": {}}))


def test_solved_problems_stand_before_each_and_are_not_trained_on(tmp_path):
    plain = table(tmp_path, as_jsonl(ROWS), **COLUMNS, prompt="{question} =")
    task = plain.model_copy(update={"few_shot": 2, "system": "Add."})
    shots, first = plain.problems("train")[:2], plain.problems("test")[0]
    one, two = ((p.prompt, p.solution) for p in shots)
    seen = task.problems("test")[0]
    assert seen.prompt == f"Add.\n\n{one[0]} {one[1]}\n\n{two[0]} {two[1]}\n\n{first.prompt}"
    assert seen.chat.messages == (
        ("system", "Add."),
        *(turn for q, a in (one, two) for turn in (("user", q), ("assistant", a))),
        ("user", first.prompt),
    )
    assert [p.id for p in task.problems("train")] == [p.id for p in plain.problems("train")[2:]]
    with pytest.raises(InvalidValueError, match=r"few_shot 99: the train split has \d+ problems; take fewer"):
        plain.model_copy(update={"few_shot": 99}).problems("test")


VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} and {n}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
        "extra_info": {"split": "train", "index": n},
    }
    for n in range(40)
]


def test_the_parquet_of_verl_reads_as_it_is(tmp_path):
    task = table(tmp_path, as_parquet(VERL), "train.parquet")
    problems = [p for split in SPLITS for p in task.problems(split)]
    assert sorted(int(p.answer) for p in problems) == list(range(0, 80, 2))
    (one,) = (p for p in problems if p.answer == "14")
    assert one.chat.messages == (("system", "Be brief."), ("user", "7 and 7?"))
    assert one.prompt == "Be brief.\n\n7 and 7?"
    by_field = table(tmp_path, as_parquet(VERL), "again.parquet", answer="extra_info.index", split="extra_info.split")
    assert [p.answer for p in by_field.problems("train")] == [str(n) for n in range(40)]
    with pytest.raises(InvalidValueError, match=r"row 1: the file holds whole messages; leave task.prompt out"):
        table(tmp_path, as_parquet(VERL), "train.parquet", prompt="Ask: {question}").problems("train")


def test_a_list_that_is_no_conversation_is_named(tmp_path):
    rows = [{"question": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "answer": 1}]
    with pytest.raises(InvalidValueError, match=r"line 1: 'question' is a list, but no conversation that ends with"):
        table(tmp_path, as_jsonl(rows)).problems("train")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"choices": ["4", "5", "6"], "answer": 1}, "choices"),
        ({"choices": ["4", "5", "6"], "answer": "B"}, "choices"),
        ({"choices": ["4", "5", "6"], "answer": "5"}, "choices"),
        ({"choices": {"text": ["4", "5", "6"], "label": ["1", "2", "3"]}, "answer": "2"}, "choices"),
        ({"choices": '["4", "5", "6"]', "answer": "b"}, "choices"),
        ({"first": "4", "second": "5", "third": "6", "answer": "second"}, ("first", "second", "third")),
    ],
)
def test_choices_are_lettered_and_the_gold_is_a_letter_however_the_data_names_it(tmp_path, row, columns):
    rows = as_jsonl([{"question": "Two and three?", **row}])
    task = table(tmp_path, rows, scorer="choice", choices=columns, test_path=tmp_path / "qa.jsonl")
    (problem,) = task.problems("test")
    assert problem.question == "Two and three?\nA. 4\nB. 5\nC. 6"
    assert problem.answer == "B"
    assert 'the letter of the right choice after "####"' in problem.prompt
    assert [task.score(problem, text).strict for text in (problem.solution, "So it is\n#### (B)", "#### C")] == [
        True,
        True,
        False,
    ]
    assert task.score(problem, "The answer is (B).").flexible


@pytest.mark.parametrize("answer", [3, "D", "7", "-1"])
def test_an_answer_that_is_no_choice_is_named_with_its_line(tmp_path, answer):
    rows = as_jsonl([{"question": "?", "choices": ["4", "5", "6"], "answer": answer}])
    with pytest.raises(InvalidValueError, match=r"line 1: 'answer' '.*' is none of the 3 choices; write its letter"):
        table(tmp_path, rows, scorer="choice", choices="choices").problems("train")


@pytest.mark.parametrize(
    ("answer", "gold", "equal", "other"),
    [
        (r"Then $x=\frac{1}{2}$, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{2}"),
        (r"\sqrt{12}", r"\sqrt{12}", r"it is \boxed{2\sqrt{3}}", r"\boxed{12}"),
        ("$[-2,7]$", "[-2,7]", r"\boxed{[-2, 7]}", r"\boxed{(-2,7)}"),
        (12, "12", r"\boxed{12}", r"\boxed{13}"),
        (12, "12", r"\boxed{12.}", r"\boxed{1.2}"),
        (r"\{1,2\}", r"\{1,2\}", r"\boxed{\{2,1\}}", r"\boxed{(1,2)}"),
        (r"x \in \{1,2\}", r"x \in \{1,2\}", r"\boxed{1, 2}", r"\boxed{\left( 1, 2 \right)}"),
        ("(1,2)", "(1,2)", r"\boxed{(1, 2)}", r"\boxed{\{1,2\}}"),
        (r"\text{June 20}", r"\text{June 20}", r"\boxed{June 20}", r"\boxed{June 21}"),
        (r"so $x = \boxed 5$.", "5", r"thus \boxed 5.", r"\boxed 6"),
        (r"it is $\boxed -12$ or so", "-12", r"\(\boxed{-12}\)", r"$\boxed 12$"),
    ],
)
def test_formulas_are_compared_as_mathematics(tmp_path, answer, gold, equal, other):
    pytest.importorskip("math_verify")
    rows = as_jsonl([{"problem": "What?", "solution": answer}])
    task = table(
        tmp_path,
        rows,
        question="problem",
        answer="solution",
        scorer="math_verify",
        test_path=str(tmp_path / "qa.jsonl"),
    )
    (problem,) = task.problems("test")
    assert problem.answer == gold
    assert r"within \boxed{}" in problem.prompt
    scores = [task.score(problem, text) for text in (problem.solution, equal, other, "I do not know")]
    assert [score.strict for score in scores] == [True, True, False, False]
    assert [score.formatted for score in scores] == [True, True, True, False]


def test_texts_are_compared_after_the_mark(tmp_path):
    rows = as_jsonl([{"question": "The capital of France?", "answer": "Paris"}])
    task = table(tmp_path, rows, scorer="exact", test_path=tmp_path / "qa.jsonl")
    (problem,) = task.problems("test")
    scores = [task.score(problem, text) for text in ("It is\n#### Paris", "#### paris.", "Paris", "#### Rome")]
    assert [(s.strict, s.flexible, s.formatted) for s in scores] == [
        (True, True, True),
        (False, True, True),
        (False, True, False),
        (False, False, True),
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"choices": "c"}, "task.choices: letters are compared by scorer: choice"),
        ({"split": "s", "test_path": "t.csv"}, "task.split: test_path is the test split already"),
        ({"chat": False, "chat_template_kwargs": {"enable_thinking": False}}, "no template is applied"),
        ({"prompt": "Say {q}"}, "no place for the question"),
        ({"scorer": "numbers"}, "expected 'number', 'choice', 'math_verify' or 'exact'"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_when_they_are_read(keys, message):
    with pytest.raises(InvalidValueError, match=message):
        parse(Experiment, {"task": {"name": "table", "path": "qa.csv", **keys}}, "")


def test_what_is_new_leaves_the_descriptions_of_earlier_runs_as_they_were():
    """The kind: ids of runs are digests of descriptions; a key at its default is not written."""
    task = Gsm8k(path="train.jsonl", prompt="Question: {question}\nAnswer:")
    assert json.loads(canonical(task)) == {
        "name": "gsm8k",
        "path": "train.jsonl",
        "test_path": None,
        "prompt": "Question: {question}\nAnswer:",
    }
    table_keys = set(json.loads(canonical(Table(path="qa.csv"))))
    assert table_keys == {"name", "path", "test_path", "prompt"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"'gone.csv' does not exist; give the path of a local"):
        Table(path="gone.csv").problems("train")
