"""The final: what its control trains, and what of the comparison stays in the record and in the words."""

import pytest

from fp4rl.lab.compare.comparison import Question, answer_all
from fp4rl.lab.compare.sides import At, Side, SideRun
from fp4rl.lab.runs import read_run
from fp4rl.lab.search.candidates import Recipes
from fp4rl.lab.search.final import final_suite, judged_by
from fp4rl.lab.search.records import Begun, Book, Chosen, Judged, Measured, Proposed
from fp4rl.lab.search.result import Result
from fp4rl.spec.load import arm_contents
from fp4rl.spec.space import Space

SEEDS = (0, 1)
QUANTIZED = {"injection": {"weight": "mxfp4"}}
UNTOUCHED = {"sites": 0, "calls": {}, "master_unharmed": True}
CHOSEN = Proposed(number=0, batch=0, point={"training.lr": "0.0001"}, words="lr 0.0001")


def space_with(control=None, base=None):
    content = {
        "search": "mine",
        "base": {"injection": "w4a4", "training": {"steps": 30}, "noise": {}} | (base or {}),
        "space": {"training.lr": [1e-4, 2e-4]},
        "screening": {"rungs": [20, 60], "seeds": [7]},
        "final": {"seeds": list(SEEDS), "count": 40, "margin": 0.01},
    }
    return Space.model_validate(content | ({} if control is None else {"control": control}))


@pytest.mark.parametrize("control", [{}, {"training.lr": 3e-4}])
def test_a_control_of_ones_own_is_unquantized_and_trains_as_long_as_the_last_round(control):
    own = dict(arm_contents(final_suite(Recipes(space_with(control)), CHOSEN, SEEDS, "f")))["control"]
    assert own.injection is own.noise is own.training.distillation is None
    assert own.training.steps == 60
    assert own.training.lr == control.get("training.lr", own.training.lr)


def test_steps_that_a_control_names_are_its_own():
    suite = final_suite(Recipes(space_with({"training": {"steps": 90}})), CHOSEN, SEEDS, "f")
    assert dict(arm_contents(suite))["control"].training.steps == 90


@pytest.fixture
def judged(make_run):
    """`judged(steps, **result)`: the record of a final whose control trains so many steps, and the recipe 60."""

    def make(steps, **result):
        runs = {"recipe": [], "control": []}
        for seed in SEEDS:
            treatment = make_run(
                "recipe", seed, 0.9 + 0.01 * seed, spec=QUANTIZED | {"training": {"steps": 60, "lr": 2e-4}}, **result
            )
            spec = {"training": {"steps": steps, "lr": 2e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 6}}
            plain = make_run("control", seed, 0.8 + 0.01 * seed, spec=spec, evidence=UNTOUCHED)
            runs["recipe"].append(read_run(treatment))
            runs["control"].append(read_run(plain))
        sides = [
            Side(f"{arm}@deployment", "trial", tuple(SideRun(run, At().of(run, "deployment")) for run in own))
            for arm, own in runs.items()
        ]
        factors = ("injection", "training", "training.steps", "training.lr_scheduler", "training.lr_warmup_steps")
        question = Question(*(side.name for side in sides), factors=factors, margin=1.0, declared=True)
        return judged_by(answer_all([(question, *sides)], lambda run: None)[0], SEEDS, 1.0)

    return make


def paragraph(line, control=None):
    """The paragraph of a search whose final is in the record as `line`."""
    space = space_with(control)
    run = Measured(candidate=0, steps=60, seed=7, run="r", solved=(1,))
    chosen = Chosen(candidate=0, round=1, close=(), why="100.0 %")
    begun = Begun(digest="d", space={}, size=2, sampler="grid")
    return Result(space, Book(lines=[begun, CHOSEN, run, chosen, line])).paragraph


@pytest.mark.parametrize(("steps", "equal"), [(60, True), (30, False)])
def test_equal_budget_is_said_where_the_runs_say_so_and_else_what_each_took(judged, steps, equal):
    line = judged(steps)
    assert line.budgets["equal"] is equal
    assert ("of equal budget" in paragraph(line)) is equal
    assert ("recipe took 60 steps, control took 30 steps" in paragraph(line)) is not equal
    assert Judged.model_validate_json(line.model_dump_json(exclude_none=True)).budgets["equal"] is equal


def test_a_verdict_without_known_budgets_says_nothing_of_equal_budget():
    line = Judged(word="reaches", sentence="x.", treatment=(1.0, 1.0), control=(1.0, 1.0), seeds=SEEDS, margin=1.0)
    assert "equal budget" not in paragraph(line)


def test_what_may_not_be_quoted_is_recorded_and_said_with_the_marks_of_runs(judged):
    line = judged(30, preflight="skipped")
    assert (line.word, line.quotable) == ("better", False)
    assert len(line.marks) == 1
    assert "the preflight of trial/recipe-s0" in line.marks[0]
    said = paragraph(line)
    assert line.marks[0] in said
    assert "may not be quoted alone" in said


def test_both_say_what_they_trained_with_and_whose_hyperparameters_the_control_has(judged):
    line = judged(60)
    assert line.trained == (
        "learning rate 0.0002, constant schedule, 60 steps",
        "learning rate 0.0002, cosine schedule with 6 warm-up steps, 60 steps",
    )
    chosen_for = "were chosen for the recipe and not for the control"
    assert all(text in paragraph(line) for text in (*line.trained, chosen_for))
    assert chosen_for not in paragraph(line, control={})
