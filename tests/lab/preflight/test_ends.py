"""What the fake steps end in: treatments that are none, numbers of another policy, updates that nobody asked for."""

from fp4rl.lab.preflight import ends
from fp4rl.rl import run, trainer

FASTER = {"training": {"lr": 8e-4}}


def told(checked):
    return [(row.verdict, row.arms) for row in checked]


def test_arms_that_end_in_the_same_weights_fail(subject, rows, monkeypatch):
    """A learning rate that never reaches the trainer makes two names of one recipe."""
    assert told(rows(ends, "apart", subject(a={}, b=FASTER, c={"evaluation": {"count": 7}}))) == [("pass", ())]
    made = trainer.arguments
    monkeypatch.setattr(trainer, "arguments", lambda *a: made(*a) | {"learning_rate": 4e-4})
    own = subject(a={}, b=FASTER, c={"training": {"steps": 9}}, d={"training": {"clip_ratio_high": 0.9}})
    checked = rows(ends, "apart", own)
    of_a = {row.arms[1]: row for row in checked if row.arms[0] == "a"}
    assert {arm: row.verdict for arm, row in of_a.items()} == {"b": "fail", "c": "waits", "d": "warn"}
    assert of_a["b"].measured.endswith("whatever training.lr")
    assert of_a["c"].measured.startswith("training.steps: beyond 3 small steps")


def test_noise_that_draws_no_other_token_is_warned_of(subject, rows):
    """A little of it acts on weights in every rollout, and a few small steps need not show it."""
    little = {"noise": {"schedule": {"kind": "geometric", "sigma_start": 1e-7, "sigma_end": 1e-7}}}
    (row,) = rows(ends, "apart", subject(a={}, b=little))
    assert row.verdict == "warn"
    assert row.measured.endswith("whatever noise: in 3 small steps it changed nothing")


def test_an_injection_that_is_wired_to_nothing_fails(subject, rows, monkeypatch):
    rounded = {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}}
    assert told(rows(ends, "apart", subject(a={}, b=rounded))) == [("pass", ())]
    assert ends._acts_each_step("injection", (None, rounded["injection"] | {"weight": "mxfp4"}))
    assert not ends._acts_each_step("injection", (None, {"weight": None, "errors": [{"kind": "spike"}]}))


def test_last_numbers_of_the_start_fail(subject, rows, monkeypatch):
    assert told(rows(ends, "last", subject())) == [("pass", ())]
    judged = run.Run.evaluated
    monkeypatch.setattr(
        run.Run, "evaluated", lambda self, folder, step, last=False: judged(self, self.start, step, last=last)
    )
    (row,) = rows(ends, "last", subject())
    assert row.verdict == "fail"
    assert row.measured.startswith("judged at last: the weights of step 0, ")


def test_an_optimizer_that_steps_twice_fails(subject, rows, monkeypatch):
    (row,) = rows(ends, "work", subject())
    assert row.verdict == "pass"
    assert row.measured.startswith("6 updates from 48 answers, 48 drawn with ")
    created = trainer.Trainer.create_optimizer

    def twice(self, model=None):
        optimizer = created(self, model)
        step = optimizer.step
        optimizer.step = lambda *args, **keys: (step(*args, **keys), step(*args, **keys))[1]
        return optimizer

    monkeypatch.setattr(trainer.Trainer, "create_optimizer", twice)
    (row,) = rows(ends, "work", subject())
    assert (row.verdict, row.measured[:10]) == ("fail", "12 updates")
