"""`fp4rl data` finds every fault that is planted in a table, by its line, and none in a sound one."""

import gzip
import json

import pytest

from fp4rl.cli.main import main

SOUND = [
    {
        "question": f"Tom has {n} pens and buys {n % 7 + 1} more. How many?",
        "answer": f"He has {n} + {n % 7 + 1}.\n#### {n + n % 7 + 1}",
    }
    for n in range(40, 100)
]
LATEX = [
    {"question": f"What is half of ${n}$?", "answer": rf"It is $\frac{{{n}}}{{2}}$: \boxed{{\frac{{{n}}}{{2}}}}."}
    for n in range(60)
]


@pytest.fixture
def checked(tmp_path, capsys):
    """`checked(rows, **task)` -> the exit code, and what --json prints, of a spec with a table of these rows."""

    def run(rows, *words, name="qa.jsonl", **task):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        keys = {"name": "table", "path": str(tmp_path / name), **task}
        spec = {"task": keys, "evaluation": {"count": 1}, "training": {"max_prompt_length": 220}}
        (tmp_path / "s.yaml").write_text(json.dumps(spec))
        code = main(["data", str(tmp_path / "s.yaml"), *words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def faults(printed):
    return {(fault["kind"], fault["where"].rpartition(", ")[2]) for fault in printed["faults"]}


def test_a_sound_table_has_no_fault_and_its_counts_and_lengths_are_said(checked):
    code, printed = checked(SOUND, name="qa.jsonl.gz")
    assert (code, printed["faults"]) == (0, [])
    assert sum(printed["problems"].values()) == 60
    rows = {row["what"]: row for row in printed["lengths"]}
    assert {what: rows[what]["count"] for what in rows if what != "solutions"} == {
        f"{split} prompts": count for split, count in printed["problems"].items() if count
    }
    assert all(
        row["median"] <= row["p99"] <= row["longest"] <= row["limit"]
        for row in rows.values()
        if row["what"] != "solutions"
    )


@pytest.mark.parametrize(
    ("line", "planted", "kind"),
    [
        (7, {**SOUND[1]}, "duplicate"),
        (7, {**SOUND[1], "question": SOUND[1]["question"].upper().replace("?", " !")}, "duplicate"),
        (7, {**SOUND[1], "answer": "#### 3"}, "contradiction"),
        (9, {**SOUND[8], "answer": "He has 48 + 7 ="}, "unscorable"),
        (9, {**SOUND[8], "answer": "It is unknown."}, "unscorable"),
        (9, {**SOUND[8], "answer": "#### five"}, "unscorable"),
        (9, {**SOUND[8], "answer": ""}, "unreadable"),
        (9, "{'question': 3}", "unreadable"),
        (5, {**SOUND[4], "answer": "So he has 44 and then the"}, "unscorable"),
        (5, {**SOUND[4], "question": SOUND[4]["question"] + " #### 47"}, "leakage"),
        (5, {**SOUND[4], "question": SOUND[4]["question"] + " Think." * 40}, "too long"),
    ],
)
def test_each_planted_fault_is_found_at_its_line_and_alone(checked, line, planted, kind):
    code, printed = checked([*SOUND[: line - 1], planted, *SOUND[line:]])
    assert code == 1
    assert faults(printed) == {(kind, f"line {line}")}


def test_a_number_that_may_be_cut_off_is_a_remark_since_sound_files_have_such_too(checked):
    """GSM8K's own training file has 13: 150 thousand is asked for, and 150000 computed."""
    code, printed = checked([*SOUND[:4], {**SOUND[4], "answer": "So <<40+15=55>>55.\n#### 5"}, *SOUND[5:]])
    assert (code, printed["faults"]) == (0, [])
    (remark,) = printed["remarks"]
    assert remark["where"].endswith("line 5")
    assert "the final number is 5, and what was computed last 55" in remark["what"]


def test_a_test_question_that_is_trained_on_is_named_with_both_its_places(checked, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (SOUND[50], SOUND[3], SOUND[51])))
    code, printed = checked(SOUND[:40], test_path=str(tmp_path / "test.jsonl"))
    assert code == 1
    (fault,) = printed["faults"]
    assert (fault["kind"], fault["where"]) == ("leakage", f"{tmp_path / 'test.jsonl'}, line 2")
    assert f"{tmp_path / 'qa.jsonl'}, line 4" in fault["what"]


def test_formulas_that_never_close_and_those_that_cannot_be_read_are_named(checked):
    pytest.importorskip("math_verify")
    assert checked(LATEX, scorer="math_verify")[1]["faults"] == []
    broken = [
        *LATEX[:4],
        {**LATEX[4], "answer": r"So \boxed{\frac{4}{"},
        {**LATEX[5], "answer": r"\boxed{\frac{}{}}"},
        *LATEX[6:],
    ]
    code, printed = checked(broken, scorer="math_verify")
    assert code == 1
    assert faults(printed) == {("unscorable", "line 5"), ("unscorable", "line 6")}


def test_a_solution_without_a_box_is_named_where_the_others_have_one(checked):
    pytest.importorskip("math_verify")
    rows = [*LATEX[:4], {**LATEX[4], "answer": "no box here"}, {**LATEX[5], "answer": r"so $\boxed 5$"}, *LATEX[6:]]
    code, printed = checked(rows, scorer="math_verify")
    assert code == 1
    assert faults(printed) == {("unscorable", "line 5")}
    assert r"no \boxed{...} in the answer, which" in printed["faults"][0]["what"]
    plain = [{**row, "answer": rf"\frac{{{n}}}{{97}}"} for n, row in enumerate(LATEX, 1)]
    assert checked(plain, scorer="math_verify")[1]["faults"] == []  # a column of final answers


def test_answers_that_were_all_cut_at_one_length_are_named(checked):
    long = [
        f"We add {n} and {n % 7 + 1}, digit by digit, and get the sum, which is then, as asked: {n + n % 7 + 1}"
        for n in range(40, 100)
    ]
    rows = [
        {**row, "answer": text[:70] if n % 9 == 0 else f"#### {n}"}
        for n, (row, text) in enumerate(zip(SOUND, long, strict=True))
    ]
    code, printed = checked(rows, scorer="exact")
    assert code == 1
    assert {kind for kind, _ in faults(printed)} == {"cut off"}
    assert len(printed["faults"]) == 7


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ({"answer": "anwser"}, "no column 'anwser'; did you mean 'answer'? - so in 60 of 60 rows"),
        ({"answer": "id"}, "as numbers of rows do"),
        ({"question": "qestion"}, "no column 'qestion'; did you mean 'question'? - so in 60 of 60 rows"),
        ({"question": "id"}, "'id' is int, not text; write it as a string - so in 60 of 60 rows"),
        ({"split": "prt"}, "no column 'prt'; did you mean 'part'? - so in 60 of 60 rows"),
        ({"split": "topic"}, "'topic' is 'sums'; write train, validation or test - so in 60 of 60 rows"),
        ({"filter": {"lvl": 3}}, "no column 'lvl'; did you mean 'level'? - so in 60 of 60 rows"),
        ({"answer": "anwser", "few_shot": 3}, "no column 'anwser'; did you mean 'answer'? - so in 60 of 60 rows"),
        ({"answer": "number"}, "as numbers of rows do; task.answer could be answer"),
        ({"answer": "topic"}, "so in 60 of 60 rows; task.answer could be answer"),
        ({"answer": "level"}, "all 60 gold answers are '3'"),
        ({"question": "topic"}, "60 of 60 questions are 'sums'"),
        ({"question": "number"}, "the questions are numbers, such as '7000'"),
        ({"answer": "question", "scorer": "exact"}, "60 of 60 answers are the question itself"),
        ({"question": "answer"}, "60 of 60 answers are the question itself"),
    ],
)
def test_a_wrong_column_is_said_once_and_nothing_that_only_follows_from_it(checked, task, what):
    more = {"topic": "sums", "level": 3, "part": "train"}
    rows = [{**row, "id": 1000 + n, "number": str(7000 + n), **more} for n, row in enumerate(SOUND)]
    code, printed = checked(rows, **task)
    assert code == 1
    (fault,) = printed["faults"]
    assert fault["kind"] == "wrong column"
    assert what in fault["what"]


@pytest.mark.parametrize("first", [0, 1, 1000])
def test_honest_answers_that_count_up_are_a_suspicion_and_no_fault(checked, tmp_path, capsys, first):
    rows = [{"question": f"What is {n} + {first}?", "answer": n + first, "a": n, "level": n} for n in range(60)]
    code, printed = checked(rows)
    assert (code, printed["faults"]) == (0, [])
    (remark,) = printed["remarks"]
    assert remark["kind"] == "maybe wrong column"
    assert f"count up ({first}, {first + 1}, {first + 2} ...)" in remark["what"]
    assert main(["reward", str(tmp_path / "s.yaml"), "--sample", "0", "--json"]) == 0
    gold = json.loads(capsys.readouterr().out)["gold"]
    assert (gold["faults"], gold["notes"]) == ([], [remark["what"]])


def test_worked_answers_that_count_up_are_not_even_suspected(checked):
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} and one make\n#### {n + 1}"} for n in range(60)]
    assert checked(rows)[1]["remarks"] == []


def test_the_wrong_columns_of_a_test_file_are_said_once_and_sound_rows_beside_them_are_checked(checked, tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"q": n, "a": n}) + "\n" for n in range(8)))
    code, printed = checked([*SOUND[:40], SOUND[3]], test_path=str(tmp_path / "test.jsonl"))
    assert code == 1
    assert faults(printed) == {("wrong column", "line 1"), ("duplicate", "line 41")}
    assert "so in 8 of 8 rows" in printed["faults"][0]["what"]


def test_a_test_file_that_is_the_training_file_is_one_fault(checked, tmp_path):
    code, printed = checked(SOUND, test_path=str(tmp_path / "qa.jsonl"))
    assert code == 1
    assert [fault["what"] for fault in printed["faults"]] == [
        "all 60 test questions are in the other splits: name another file"
    ]


@pytest.mark.parametrize(
    ("rows", "task", "what"),
    [
        ([], {}, "holds no rows; give a file with the columns question and answer"),
        (SOUND, {"filter": {"question": "gone"}}, "task.filter leaves none of its rows: {'question': 'gone'}"),
        (SOUND, {"few_shot": 90}, "few_shot 90: the train split has"),
        (["{'no': 'json'}"] * 40, {}, "write one object a line - so in 40 of 40 rows"),
    ],
)
def test_a_table_of_which_nothing_is_left_is_one_fault(checked, rows, task, what):
    code, printed = checked(rows, **task)
    assert code == 1
    (fault,) = printed["faults"]
    assert what in fault["what"]
    assert not fault["what"].rstrip().endswith(":")


def test_solutions_over_the_limit_of_answers_are_remarks_with_their_lines(checked):
    long = {**SOUND[4], "answer": "We count them one by one. " * 30 + SOUND[4]["answer"]}
    code, printed = checked([*SOUND[:4], long, *SOUND[5:]])
    assert (code, printed["faults"]) == (0, [])
    (remark,) = printed["remarks"]
    assert (remark["kind"], remark["where"].rpartition(", ")[2]) == ("maybe too long", "line 5")
    assert "training.max_response_length is 48" in remark["what"]


def test_a_choice_that_is_none_of_them_is_named(checked):
    rows = [{"question": f"Which is {n}?", "choices": [n, n + 1, n + 2], "answer": n % 3} for n in range(60)]
    assert checked(rows, scorer="choice", choices="choices")[0] == 0
    code, printed = checked([*rows[:9], {**rows[9], "answer": 3}, *rows[10:]], scorer="choice", choices="choices")
    assert (code, faults(printed)) == (1, {("unscorable", "line 10")})


def test_too_few_problems_to_judge_on_are_said_with_the_number_to_set(checked):
    code, printed = checked(SOUND, "evaluation.count=50")
    assert code == 1
    (fault,) = printed["faults"]
    assert f"set evaluation.count={printed['problems']['test']}" in fault["what"]


def test_prompts_that_will_be_left_out_are_no_fault_and_are_counted(checked, tmp_path, capsys):
    rows = [*SOUND, {"question": "Long? " * 60, "answer": 1}]
    assert checked(rows)[0] == 1
    words = ["training.filter_overlong_prompts=true"]
    assert checked(rows, *words)[0] == 0
    assert main(["data", str(tmp_path / "s.yaml"), *words]) == 0
    assert "1 prompt over the limit will be dropped" in capsys.readouterr().out


def test_the_screen_shows_the_places_and_ends_in_one_line(checked, tmp_path, capsys):
    checked([*SOUND, SOUND[2]])
    assert main(["data", str(tmp_path / "s.yaml")]) == 1
    shown = capsys.readouterr()
    assert "duplicate: 1" in shown.out
    assert "line 61: asks what" in " ".join(shown.out.split())
    assert shown.err.strip().endswith("s.yaml")
    assert "fp4rl: 1 fault in the data of" in shown.err


def test_generated_problems_are_counted_too(capsys):
    assert main(["data", "catalogue/quickstart", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["problems"]["test"] > 500
    assert printed["faults"] == []
