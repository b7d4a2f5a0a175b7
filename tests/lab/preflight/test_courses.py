"""The course of each arm as its trainer takes it: defects planted in the live objects, a clean case beside each."""

from dataclasses import replace

import pytest
import torch

from fp4rl.lab.preflight import courses, data
from fp4rl.lab.preflight.rehearsal import rehearsed
from fp4rl.rl import session, trainer
from planted import small

RECIPE = small.SMALL["training"] | {"steps": 10}
W4A8 = {"injection": {"mode": "w4a8", "deployment": "compressed_tensors"}}
QUESTION = {"question": "q?", "treatment": "b@full", "control": "a@full", "factors": ["injection"]}
ASKED = {"comparisons": [QUESTION]}


@pytest.fixture
def verdict(subject, rows):
    """`verdict(check, **arms)` -> the verdict and the measured value of the only row of a check."""

    def of(check, suite=None, base=None, **arms):
        (row,) = rows(courses, check, subject(base, suite, **arms))
        return row.verdict, row.measured

    return of


def recipe(**keys):
    return {"training": RECIPE | keys}


def instead(monkeypatch, holder, name, change):
    """Put `change(original)` in the place of a name of the live code."""
    monkeypatch.setattr(holder, name, change(getattr(holder, name)))


def test_the_rates_are_those_of_a_linear_warm_up(subject):
    """Two updates a step: of two steps of warm-up the k-th update has k/4 of the rate, and of a decay to 0 over the 16
    others each has a 16th less (counted by hand)."""
    own = rehearsed(subject(recipe(lr=1e-3, lr_warmup_steps=2, lr_scheduler="linear")))["a"]
    rising, falling = [k / 4 for k in range(4)], [k / 16 for k in range(16, 0, -1)]
    assert own.rates == pytest.approx([1e-3 * share for share in (*rising, *falling)])


def test_a_warm_up_that_takes_most_of_the_run_is_seen_in_the_optimizer(verdict, monkeypatch):
    assert verdict("warm-up", base=recipe(lr_warmup_steps=2)) == (
        "pass",
        "lr rises to 0.0004 in 2 of 10 steps, and ends at 0.0004",
    )
    assert verdict("warm-up", base=recipe(lr_warmup_steps=6))[0] == "warn"
    assert verdict("warm-up", base=recipe(lr_warmup_steps=20))[0] == "fail"  # it is never reached
    # Warm-up in steps of accumulation, where the trainer counts updates.
    instead(
        monkeypatch,
        trainer,
        "arguments",
        lambda made: lambda *a: (own := made(*a)) | {"warmup_steps": 7 * own["warmup_steps"]},
    )
    told, measured = verdict("warm-up", base=recipe(lr_warmup_steps=1))
    assert (told, measured) == ("fail", "lr rises to 0.0004 in 7 of 10 steps, and ends at 0.0004")


def test_a_trainer_that_stops_before_the_last_step_fails(verdict, monkeypatch):
    judged = recipe() | {"evaluation": {"count": 8, "test_freq": 4}}
    assert verdict("agenda", base=judged) == ("pass", "judged at steps 0, 4, 8 and 10, where the trainer stops")
    instead(
        monkeypatch,
        trainer,
        "arguments",
        lambda made: lambda *a: (own := made(*a)) | {"max_steps": own["max_steps"] - 2},
    )
    told, measured = verdict("agenda", base=judged)
    assert (told, measured) == ("fail", "judged at steps 0, 4, 8 and 9, where the trainer stops, of 10 steps")


def test_a_callback_that_judges_at_other_steps_fails(verdict, monkeypatch):
    judged = recipe() | {"evaluation": {"count": 8, "test_freq": 4}}
    instead(monkeypatch, session.TrainingSession, "on_step", lambda on: lambda self, step, m: on(self, step + 1, m))
    assert verdict("agenda", base=judged) == ("fail", "judged at steps 0, 3, 7 and 10, where the trainer stops")


def test_a_step_of_fewer_answers_than_described_fails(verdict, monkeypatch):
    """10 steps of 2 updates from 4 prompts with 4 answers each."""
    assert verdict("budget", base=recipe()) == ("pass", "10 steps, 20 updates, 160 answers")
    instead(monkeypatch, trainer, "Filler", lambda made: lambda *parts: made(*parts[:-1], parts[-1] // 2))
    assert verdict("budget", base=recipe()) == ("fail", "10 steps, 20 updates, 80 answers")


SEEDS = {
    "batch": (session, "PromptStream", lambda made: lambda problems, _: made(problems, 0)),
    "answers": (trainer, "seed_rollout", lambda made: lambda _, *where: made(0, *where)),
}


@pytest.mark.parametrize("what", SEEDS)
def test_a_seed_that_is_wired_to_nothing_fails(what, verdict, monkeypatch):
    assert verdict("two seeds")[0] == "pass"
    instead(monkeypatch, *SEEDS[what])
    assert verdict("two seeds") == ("fail", f"another seed draws the same {what}, so that n seeds are one run")


def test_start_weights_that_an_injection_changes_fail(verdict, monkeypatch):
    assert verdict("alike", ASKED, a={}, b=W4A8) == ("pass", "1 question: 9 values of each arm as they should be")

    def shifts(attach):
        def attached(model, injection):
            with torch.no_grad():
                next(iter(model.parameters())).mul_(1 + 2**-8)
            return attach(model, injection)

        return attached

    instead(monkeypatch, session, "attach", shifts)
    told, measured = verdict("alike", ASKED, a={}, b=W4A8)
    assert told == "fail"
    assert measured.startswith("question 1: start weights differ: ")


def test_an_optimizer_that_is_another_in_one_arm_fails(verdict, monkeypatch):
    def decays(create):
        def created(self, model=None):
            optimizer = create(self, model)
            if self.parts.phases.attachment is not None:
                optimizer.param_groups[0]["weight_decay"] = 0.1
            return optimizer

        return created

    instead(monkeypatch, trainer.Trainer, "create_optimizer", decays)
    told, measured = verdict("alike", ASKED, a={}, b=W4A8)
    assert told == "fail"
    assert "weight_decay 0.1" in measured


def test_what_differs_beside_the_factor_is_named_with_both_values(subject, rows):
    warmer = W4A8 | {"training": {"temperature": 0.7}}
    (row,) = rows(courses, "alike", subject(suite=ASKED, a={}, b=warmer))
    assert row.verdict == "warn"
    assert row.measured.startswith("question 1: sampling differ: temperature 0.7, ")
    assert row.cure == "make training.temperature alike, or a factor"
    declared = {"comparisons": [QUESTION | {"factors": ["injection", "training.temperature"]}]}
    assert [row.verdict for row in rows(courses, "alike", subject(suite=declared, a={}, b=warmer))] == ["pass"]


def test_a_value_that_a_factor_is_not_known_to_change_is_a_warning(verdict, monkeypatch):
    """The table of what changes what may lack a key; a sound run is not refused for that."""
    asked = {"comparisons": [QUESTION | {"factors": ["training.lr"]}]}
    monkeypatch.setattr(courses, "_KEYS", dict.fromkeys(courses._KEYS, ()) | {"learning rate": ("training.lr",)})
    told, measured = verdict("alike", asked, recipe(lr=1e-3), a={}, b={"training": {"lr": 2e-3}})
    assert told == "warn"
    assert "initial_lr 0.001" in measured
    assert "initial_lr 0.002" in measured


# A factor -> what it is in the second arm. What each changes by value is its own doing.
FACTORS = {
    "training.learned_clipping": {"lr": 0.1},
    "training.max_response_length": 20,
    "training.stop": ["#"],
    "training.top_p": 0.9,
    "training.rollout_n": 2 * RECIPE["rollout_n"],
    "training.train_batch_size": 8,
    "training.mini_batch_size": 4,
    "training.steps": 12,
    "training.epochs": 1,
    "training.algorithm": "gspo",
    "training.filter_groups": {"enable": True, "max_num_gen_batches": 2},
    "training.optimizer": "adamw_torch_fused",
    "training.lr": 1e-3,
    "training.lr_scheduler": "cosine",
    "training.weight_decay": 0.1,
    "training.ema": {"decay": 0.9},
    "training.oscillation": {},
    "training.distillation": {},
    "model.dtype": "bfloat16",
    "model.lora": {},
    "task.difficulty": 2,
    "evaluation.max_new_tokens": 9,
    "noise": {},
}


@pytest.mark.parametrize("factor", FACTORS)
def test_what_a_declared_factor_changes_by_value_is_no_difference_beside_it(verdict, factor):
    asked = {"comparisons": [QUESTION | {"factors": [factor]}]}
    group, _, key = factor.rpartition(".")
    told, measured = verdict(
        "alike", asked, recipe() | W4A8, a={}, b={group: {key: FACTORS[factor]}} if group else {key: FACTORS[factor]}
    )
    assert told == "pass", measured


def test_problems_that_are_judged_twice_fail(subject, rows, monkeypatch):
    """Eight are claimed; of four that come twice the interval is 1.96 sqrt(.25 / 4)."""
    own = subject()
    assert [row.measured for row in rows(data, "problems", own)][1] == "8 distinct problems judged: +-34.6 points"

    def doubled(made):
        def runner(experiment):
            own = made(experiment)
            return replace(own, problems=own.problems[:4] * 2)

        return runner

    instead(monkeypatch, data, "evaluation_runner", doubled)
    _, row = rows(data, "problems", own)
    assert (row.verdict, row.measured) == ("fail", "4 distinct problems judged: +-49.0 points")
