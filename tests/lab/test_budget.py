"""Budgets of recipes in stages are counted whole, and the control that would take as much is the one by hand."""

import pytest
import yaml

from fp4rl.lab.budget import Budget, as_arm, budget_of, differing, equal_control, unequal
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import merge

BASE = {
    "model": {"embedded": {}},
    "training": {"steps": 30, "train_batch_size": 16, "mini_batch_size": 8, "rollout_n": 8, "lr": 4e-4},
    "evaluation": {"profiles": ["full", "deployment"]},
    "injection": "w4a4",
}
QAD = {
    "start": {"arm": "bf16"},
    "injection": {"mode": "w4a4", "deployment": "compressed_tensors"},
    "training": {
        "steps": 60,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 6,
        "distillation": {"teacher": {"arm": "bf16"}},
    },
}


def made(**change):
    return Experiment.model_validate(merge(BASE, change))


BF16, TREATMENT = made(injection="none"), made(**QAD)


def test_stages_are_counted_together():
    """By hand: 30 + 60 steps of 16/8 = 2 updates and 16 x 8 = 128 answers."""
    assert budget_of(BF16, TREATMENT) == Budget(steps=90, updates=180, answers=11_520)
    assert budget_of(BF16, TREATMENT).sentence() == "90 steps, 180 updates, 11,520 answers"


@pytest.mark.parametrize(("steps", "differs"), [(98, False), (97, True), (100, False), (102, False), (103, True)])
def test_budgets_are_equal_within_two_percent(steps, differs):
    first, second = (budget_of(made(training={"steps": number})) for number in (100, steps))
    assert unequal(first, second) is unequal(second, first) is differs


def test_more_answers_for_as_many_updates_are_a_larger_budget():
    assert unequal(budget_of(BF16), budget_of(made(training={"rollout_n": 16})))


@pytest.mark.parametrize("beside", [{}, {"learned_clipping": {}, "oscillation": {}}])
def test_the_control_trains_as_long_in_one_stage_and_rounds_nothing(beside):
    control = equal_control(made(**merge(QAD, {"training": beside})), [BF16])
    by_hand = {"steps": 90, "lr_scheduler": "cosine", "lr_warmup_steps": 9}  # 6 of 60 is 9 of 90
    expected = made(injection="none", training=by_hand, evaluation={"profiles": ["full"]})
    assert control == expected
    assert control.start is control.injection is control.noise is control.training.distillation is None
    assert not unequal(budget_of(control), budget_of(BF16, TREATMENT))


def test_a_stage_that_decays_lends_its_schedule_to_a_treatment_that_does_not():
    first = made(injection="none", training={"lr_scheduler": "linear", "steps": 40})
    control = equal_control(made(start={"arm": "first"}), [first])
    assert (control.training.steps, control.training.lr_scheduler) == (70, "linear")


def test_of_stages_with_other_batches_the_updates_are_equal():
    """By hand: 10 steps of 4 updates and 60 of 2 are 160 updates, 80 steps of the treatment's."""
    first = made(injection="none", training={"steps": 10, "train_batch_size": 32})
    assert equal_control(TREATMENT, [first]).training.steps == 80


def test_a_control_that_rounds_keeps_what_it_rounds_and_a_start_that_is_common():
    rounded = made(start={"arm": "bf16"}, injection="w4a8")
    control = equal_control(TREATMENT, [BF16], rounded)
    assert (control.injection, control.start, control.training.steps) == (rounded.injection, TREATMENT.start, 60)
    alone = made(injection="w4a8")
    assert (equal_control(TREATMENT, [BF16], alone).start, equal_control(TREATMENT, [BF16], alone).training.steps) == (
        None,
        90,
    )


@pytest.mark.parametrize(
    ("size", "by_hand", "differs"),
    [
        (16, Budget(steps=120, updates=120, answers=11_520), False),  # 60 + 60 updates of 12 prompts
        (4, Budget(steps=75, updates=300, answers=12_000), True),  # 60 + 240 updates of 4.8 prompts: 5 are 4 % above
    ],
)
def test_of_stages_with_other_batches_the_answers_are_equal_too_or_not_fewer(size, by_hand, differs):
    """A control of 60 + 240 updates from batches of 4 prompts had 9,600 of the 11,520 answers."""
    treatment = made(**merge(QAD, {"training": {"mini_batch_size": size}}))
    whole = budget_of(BF16, treatment)
    assert whole.answers == 11_520
    control = equal_control(treatment, [BF16])
    assert budget_of(control) == by_hand
    assert unequal(by_hand, whole) is differs
    assert differing(by_hand, whole) == ("answers" if differs else None)


def test_what_the_tolerance_allows_is_equal():
    """By hand: 60 + 220 updates of 4.86 prompts. 280 of 5 have 2.9 % more answers, 276 of 5 1.4 % fewer and more."""
    treatment = made(**merge(QAD, {"training": {"steps": 55, "mini_batch_size": 4}}))
    whole = budget_of(BF16, treatment)
    assert whole == Budget(steps=85, updates=280, answers=10_880)
    control = budget_of(equal_control(treatment, [BF16]))
    assert control == Budget(steps=69, updates=276, answers=11_040)
    assert not unequal(control, whole)


def test_a_control_splits_its_updates_into_micro_batches_as_the_treatment_does():
    """By hand: 16 does not divide the 40 answers of 5 prompts; of 6 they are 25 % more, 360 updates of 4 are 20 %."""
    treatment = made(**merge(QAD, {"training": {"mini_batch_size": 4, "micro_batch_size": 16}}))
    recipe = equal_control(treatment, [BF16]).training
    assert (recipe.mini_batch_size, recipe.updates_per_step, recipe.steps) == (4, 4, 90)


def test_as_many_updates_and_answers_in_other_steps_are_an_equal_budget():
    longer = made(training={"steps": 60, "train_batch_size": 8})
    assert budget_of(longer).steps == 2 * budget_of(BF16).steps
    assert not unequal(budget_of(longer), budget_of(BF16))


def test_what_is_trained_for_the_control_too_is_no_part_of_its_own_steps():
    """By hand: the arm bf16 teaches both, so of 30 + 60 steps 60 are left."""
    taught = made(**{key: QAD[key] for key in ("training", "injection")})
    assert equal_control(TREATMENT, [BF16], taught, kept=[BF16]).training.steps == 60


@pytest.mark.parametrize(
    "base", [BASE, merge(BASE, QAD), {"training": {"optimizer": "adamw_8bit", "ema": {"decay": 0.9}}}]
)
def test_an_arm_of_the_control_can_be_pasted(base):
    control = equal_control(TREATMENT, [BF16])
    pasted = yaml.safe_load(yaml.safe_dump(as_arm(control, base)))
    assert Experiment.model_validate(merge(base, pasted)) == control


def test_an_arm_holds_what_differs_alone():
    arm = as_arm(equal_control(TREATMENT, [BF16]), BASE)
    assert arm == {
        "training": {"steps": 90, "lr_scheduler": "cosine", "lr_warmup_steps": 9},
        "injection": None,
        "evaluation": {"profiles": ["full"]},
    }


def test_what_no_override_takes_away_is_named_instead_of_kept():
    base = merge(BASE, {"evaluation": {"injections": {"mine": "w4a16"}}})
    with pytest.raises(InvalidValueError, match="no arm of this base"):
        as_arm(equal_control(TREATMENT, [BF16]), base)
