"""Searches whose truth is planted: what is chosen, that a kill changes nothing, and that what chose never judges."""

import json
import re
from typing import get_args

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab.search import beginning
from fp4rl.lab.search.alike import uncounted
from fp4rl.lab.search.conduct import OutOfTime
from fp4rl.lab.search.earlier import earlier
from fp4rl.lab.search.leakage import require_separate
from fp4rl.lab.search.records import (
    FILE,
    Added,
    AnyLine,
    Book,
    Chosen,
    Decided,
    Earlier,
    Judged,
    Measured,
    Planned,
    Proposed,
    Spent,
)
from fp4rl.lab.search.result import Result
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.space import Space, load_space
from fp4rl.spec.task_registry import TASKS
from fp4rl.tasks.arithmetic import Arithmetic
from planted.searched import MadeUp, search, space_of

BEST = {"training.lr": "0.2", "training.weight_decay": "0.3", "training.grad_clip": "0.1"}
SPACE = space_of((3, 3, 2), seeds=[0, 1, 2])


def worth(point):
    return 6.0 if dict(point) == BEST else 0.0


class Killed(BaseException):
    """What a kill does to the program: nothing after it is done."""


class Mortal(Book):
    """Records of a process that is killed when so many lines are written."""

    def __init__(self, file, lines, last):
        super().__init__(file, lines)
        self.last_line = last

    def add(self, *lines):
        for line in lines:
            if len(self.lines) >= self.last_line:
                raise Killed
            super().add(line)


def without_clock(book):
    return [line for line in book.lines if not isinstance(line, Spent)]


@pytest.mark.parametrize("space", [SPACE, space_of((6, 6, 6), candidates=24, seeds=[0, 1, 2])], ids=["grid", "tpe"])
def test_a_search_that_is_killed_at_five_moments_goes_on_and_chooses_the_same(tmp_path, space):
    whole = Book()
    search(MadeUp(space, worth), whole).run()
    file, steps = tmp_path / "search.jsonl", (3, 9, 15, 40, len(whole.lines) - 4)
    for last in steps:
        book = Mortal(file, Book.read(file).lines, last) if file.is_file() else Mortal(file, [], last)
        with pytest.raises(Killed):
            search(MadeUp(space, worth), book).run()
        with file.open("ab") as torn:  # the kill was in the middle of a line
            torn.write(b'{"kind": "propo')
    again = Book.read(file)
    search(MadeUp(space, worth), again).run()
    assert without_clock(again) == without_clock(whole)
    assert {type(line) for line in again.lines} >= {Proposed, Measured, Planned, Added, Decided, Chosen}
    done = len(again.lines)
    search(MadeUp(space, worth), again).run()
    assert [type(line) for line in again.lines[done:]] == []


def test_the_planted_recipe_is_chosen_and_called_better():
    book = Book()
    judged = search(MadeUp(SPACE, worth, seed=3), book).run()
    chosen = next(line for line in book.of(Proposed) if line.number == book.last(Chosen).candidate)
    assert (dict(chosen.point), judged.word) == (BEST, "better")


def test_a_combination_that_a_description_refuses_is_no_candidate_and_says_why():
    content = SPACE.model_dump(mode="json") | {"space": {"training.mini_batch_size": [8, 5, 16]}}
    book = Book()
    search(MadeUp(Space.model_validate(content), lambda point: 0.0), book).run()
    refused = {line.words: line.refused for line in book.of(Proposed) if line.refused}
    assert list(refused) == ["mini_batch_size 5"]
    assert "train_batch_size 16 is not a multiple of mini_batch_size 5" in refused["mini_batch_size 5"]


def test_two_combinations_that_describe_the_same_are_one_candidate():
    same = {"injection": [{"name": "by its mode", "set": {"injection": "w4a4"}}, {"name": "as it is"}]}
    book = Book()
    search(MadeUp(Space.model_validate(SPACE.model_dump(mode="json") | {"space": same}), lambda point: 0.0), book).run()
    assert [bool(line.refused) for line in book.of(Proposed)] == [False, True]


def test_a_budget_without_room_for_the_final_is_refused_with_the_smallest_that_would_do():
    with pytest.raises(InvalidValueError, match=r"--budget (\d+)m would do") as error:
        search(MadeUp(SPACE, worth), Book(), budget_s=300).run()
    enough = 60 * float(str(error.value).split("--budget ")[1].split("m")[0])
    book = Book()
    search(MadeUp(SPACE, worth), book, budget_s=enough).run()
    assert book.last(Planned).final_seeds == SPACE.final.seeds
    assert book.used_s <= enough


def test_time_that_earlier_sessions_used_is_refused_and_never_taken_from_the_seeds_of_the_final():
    """By the clock that an earlier session left, the budget holds screening and final, but not what was used too."""
    spent = Spent(used_s=1200.0)
    with pytest.raises(InvalidValueError, match=r"--budget (\d+)m would do") as error:
        search(MadeUp(SPACE, worth), Book(lines=[spent]), budget_s=1500).run()
    enough = 60 * float(str(error.value).split("--budget ")[1].split("m")[0])
    assert enough > 1500
    book = Book(lines=[spent])
    search(MadeUp(SPACE, worth), book, budget_s=enough).run()
    assert book.last(Planned).final_seeds == SPACE.final.seeds
    forced = Book(lines=[spent])
    own = search(MadeUp(SPACE, worth), forced, budget_s=1500)
    own.force = True
    own.run()
    assert len(forced.last(Planned).final_seeds) < len(SPACE.final.seeds)


def test_candidates_of_other_code_are_not_ranked_with_those_of_this(monkeypatch):
    book, whole = Mortal(None, [], 9), Book()
    with pytest.raises(Killed):
        search(MadeUp(SPACE, worth), book).run()
    search(MadeUp(SPACE, worth), whole).run()
    monkeypatch.setattr(beginning, "code_digest", lambda: "0123456789ab")
    with pytest.raises(InvalidValueError, match=r"was begun with code \w{12}, and this is 0123456789ab"):
        search(MadeUp(SPACE, worth), Book(lines=book.lines)).run()
    assert search(MadeUp(SPACE, worth), whole).run() == whole.last(Judged)


def test_searches_that_were_judged_on_the_same_problems_are_named(tmp_path):
    def run(name, task, file):
        content = SPACE.model_dump(mode="json") | {"search": name, "base": {"injection": "w4a4", "task": task}}
        space = Space.model_validate(content)
        search(MadeUp(space, worth), Book(file)).run()
        return space

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / FILE).write_text("no line of a search\n")
    task = {"name": "arithmetic", "difficulty": 2}
    for name, own in (("first", task), ("other", {"name": "arithmetic", "difficulty": 3})):
        (tmp_path / name).mkdir()
        space = run(name, own, tmp_path / name / FILE)
    assert earlier(tmp_path, space) == ()
    again = Space.model_validate(space.model_dump(mode="json") | {"search": "third", "base": {"task": task}})
    looked = earlier(tmp_path, again)
    assert looked == ("first",)
    book = Book(lines=[Earlier(searches=looked)])
    search(MadeUp(again, worth), book).run()
    assert "On the same test problems first was judged before." in Result(again, book).paragraph


class Broken(MadeUp):
    """A bench on which every run fails."""

    mistake = True

    def measure(self, cells, title):
        made = super().measure(cells, title)
        return [own.extended(solved=(), failed="no tokenizer", mistake=self.mistake) for own in made]


@pytest.mark.parametrize(("mistake", "error"), [(True, InvalidValueError), (False, CheckFailed)])
def test_first_candidates_that_all_fail_are_tried_again_by_the_same_command(mistake, error):
    book, bench = Book(), Broken(SPACE, worth, seed=3)
    bench.mistake = mistake
    with pytest.raises(error, match="none of the first candidates ran: no tokenizer"):
        search(bench, book).run()
    assert book.of(Measured) == []
    assert search(MadeUp(SPACE, worth, seed=3), book).run().word == "better"


class Interrupted(MadeUp):
    """A bench whose budget ends in the final, after so many of its seeds."""

    seeds_in = 3

    def run_final(self, chosen, seeds):
        self.whole = super().run_final(chosen, seeds)
        raise OutOfTime

    def verdict(self, seeds):
        return self.whole.extended(
            seeds=tuple(seeds[: self.seeds_in]),
            treatment=self.whole.treatment[: self.seeds_in],
            control=self.whole.control[: self.seeds_in],
            whole=self.seeds_in >= len(seeds),
            needed="something",
            p=0.01,
            quotable=True,
        )


def test_what_is_not_known_is_left_out_of_the_file_and_read_as_unknown():
    """A final without a word, and a space with a range, whose records could not be read again."""
    optional = [
        (kind, name)
        for kind in get_args(AnyLine)
        for name, field in kind.model_fields.items()
        if type(None) in get_args(field.annotation)
    ]
    assert (Judged, "word") in optional
    assert [(kind.__name__, name) for kind, name in optional if kind.model_fields[name].is_required()] == []


def test_a_final_that_the_budget_ended_has_numbers_and_no_word_until_all_its_seeds_are_in(tmp_path):
    file = tmp_path / "search.jsonl"
    book = Book.read(file)
    judged = search(Interrupted(SPACE, worth, seed=3), book).run()
    assert (judged.word, judged.whole, judged.quotable, judged.needed, judged.p) == (None, False, False, None, None)
    assert judged.sentence == "not decided: 3 of 7 seeds are in"
    paragraph = Result(SPACE, book).paragraph
    assert "not decided: 3 of 7 seeds are in" in paragraph
    assert not any(word in paragraph for word in ("better", "reaches", "lies", "no difference", "would decide"))
    kept = Book.read(file)
    assert kept.last(Judged) == judged
    more = search(MadeUp(SPACE, worth, seed=3), kept).run()
    assert (more.word, more.whole, len(more.seeds)) == ("better", True, 7)


def write(tmp_path, **change):
    content = {
        "search": "leaks",
        "base": {"injection": "w4a4", "task": {"name": "arithmetic"}},
        "space": {"training.lr": [1e-4, 2e-4]},
        "final": {"seeds": [11, 12], "count": 40, "margin": 0.01},
    } | change
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"screening": {"seeds": [0, 12]}}, "12 chooses in screening.seeds too"),
        ({"screening": {"split": "test", "count": 10}}, "10 of 40 problems of the final are screened with too"),
        ({"space": {"training.steps": [10, 20]}}, "the search sets it"),
        ({"control": {"injection": "w4a8"}}, "control: injection: the control is unquantized"),
        ({"space": {"training.rl": [1e-4]}}, "did you mean 'lr'"),
        (
            {"space": {"injection.apply_during": [{"weight": ["training"], "input": ["training"]}]}},
            "the deployment would be judged with weight and input unrounded",
        ),
        ({"base": {"injection": {"mode": "w4a4", "apply_during": ["rollout"]}}}, "base: injection.apply_during.weight"),
        ({"space": {"injection": ["none", "w4a4"]}}, "space.injection: none: injection: rounds nothing"),
        (
            {"space": {"noise": [{"schedule": {"kind": "constant", "sigma": 0.01}, "control": "bf16"}]}},
            "where the base rounds weight and input: the control is that already",
        ),
        ({"space": {"task.difficulty": [1, 2]}}, "task.difficulty would be 1 here and 2 in the base"),
        ({"space": {"task": [{"name": "arithmetic", "seed": 3}]}}, "task.seed would be 3 here and 0"),
        ({"space": {"model.embedded.size": ["s", "m"]}}, "task.difficulty would be 6 here and 2"),
        ({"space": {"training.max_response_length": [48, 96]}}, "evaluation.max_new_tokens would be 96 here and 48"),
        ({"control": {"injection": "none", "task": {"difficulty": 1}}}, "control: task.difficulty would be 1"),
        ({"control": {"injection": "none", "evaluation.count": 500}}, "control: evaluation.count would be 500"),
        ({"base": {"injection": "w4a4", "start": {"run": "s/r"}}}, "base: start.run: s/r"),
        ({"stages": {"bf16": {"start.run": "s/r"}}}, "stages.bf16: start.run: s/r"),
        ({"space": {"start": [{"run": "s/r"}]}}, "write start: {arm: STAGE}"),
        ({"space": {"from": [{"name": "bf16", "set": {"start.run": "s/r"}}]}}, "space.from: bf16: start.run: s/r"),
    ],
)
def test_what_chooses_cannot_judge(tmp_path, capsys, change, message):
    code = main(["search", str(write(tmp_path, **change)), "--runs", str(tmp_path / "runs")])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_choice_that_another_makes_judge_otherwise_is_no_candidate():
    space = {
        "injection": [{"name": own, "set": {"injection.mode": own}} for own in ("w4a4", "w4a16")],
        "phases": [
            {"name": "all"},
            {"name": "inputs train alone", "set": {"injection.apply_during.input": ["training"]}},
        ],
    }
    content = SPACE.model_dump(mode="json") | {"base": {}, "space": space}
    book = Book()
    search(MadeUp(Space.model_validate(content), lambda point: 0.0), book).run()
    refused = {line.words: line.refused for line in book.of(Proposed) if line.refused}
    assert list(refused) == ["injection w4a4, phases inputs train alone"]
    assert "judged with input unrounded" in refused["injection w4a4, phases inputs train alone"]


def test_a_teacher_that_a_run_trained_is_told_from_other_folders(tmp_path):
    final, exported = tmp_path / "runs" / "s" / "r" / "final", tmp_path / "exported"
    final.mkdir(parents=True)
    exported.mkdir()

    def why(folder):
        return uncounted({"training.distillation": {"teacher": {"path": str(folder)}}})

    assert [why(final), why(exported)] == [None, None]
    (final.parent / "result.json").write_text("{}")
    (exported / "fp4rl_export.json").write_text('{"run": null}')
    assert "was trained by a run" in why(final)
    assert why(exported) is None
    (exported / "fp4rl_export.json").write_text('{"run": "s/r"}')
    assert "teacher: {arm: STAGE}" in why(exported)


def table(file, rows):
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return {"name": "table", "path": str(file)}


@pytest.mark.parametrize("reworded", [False, True])
def test_a_stage_that_learns_the_questions_of_the_final_from_a_table_is_refused(tmp_path, capsys, reworded):
    """They are the first 40 of the test split, in the table's train and validation split or in its own test split."""
    tested = [(own.prompt, own.answer) for own in Arithmetic().problems("test", 60)]
    if reworded:
        tested = [(re.sub(r"Q: \w+ has", "Zoe has", q).removesuffix(" A:"), a) for q, a in tested]
    learned = table(tmp_path / "a.jsonl", tested[:40])
    code = main(["search", str(write(tmp_path, stages={"first": {"injection": "none", "task": learned}}))])
    message = capsys.readouterr().err
    assert code == 2
    assert int(re.search(r"stages.first: task: (\d+) of 40 problems of the final", message)[1]) >= 25
    harmless = table(tmp_path / "b.jsonl", tested[40:])
    require_separate(load_space(write(tmp_path, stages={"first": {"injection": "none", "task": harmless}})))


def test_a_table_stage_may_hold_the_questions_of_the_final_in_other_words_than_its_digits_tell(tmp_path):
    asked = Arithmetic().problems("test", 1)[0]
    more = table(tmp_path / "a.jsonl", [(f"{asked.prompt} Then 7 others come.", asked.answer)] * 1)
    require_separate(load_space(write(tmp_path, stages={"first": {"injection": "none", "task": more}})))


def test_a_question_of_the_final_that_is_only_trained_on_is_refused(tmp_path):
    rows = [(f"What is {n} + {n}?", str(2 * n)) for n in range(400)]
    cut = table(tmp_path / "a.jsonl", rows)
    learned = TASKS["table"](**cut).problems("train")[0]
    task = cut | {"test_path": table(tmp_path / "b.jsonl", [(learned.question, learned.answer)])["path"]}
    change = {"base": {"injection": "w4a4", "task": task}, "screening": {"count": 10}}
    with pytest.raises(InvalidValueError, match="base: task: 1 of 1 problems of the final are in its train split"):
        require_separate(load_space(write(tmp_path, **change, final={"seeds": [11, 12], "count": 1, "margin": 0.01})))


def test_two_files_of_the_same_questions_are_found_by_what_they_ask(tmp_path):
    """The file of the test split has another name, order and layout than the one that validation is cut from."""
    rows = [(f"What is {n} + {n}?", str(2 * n)) for n in range(400)]
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"{q},{a}\n" for q, a in rows))
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"answer": a, "question": f" {q.upper()} "}) + "\n" for q, a in reversed(rows))
    )
    task = {"name": "table", "path": str(tmp_path / "a.csv"), "test_path": str(tmp_path / "b.jsonl")}
    change = {"base": {"injection": "w4a4", "task": task}, "screening": {"count": 10}}
    with pytest.raises(InvalidValueError, match="are screened with too"):
        require_separate(load_space(write(tmp_path, **change, final={"seeds": [11, 12], "count": 400, "margin": 0.01})))
