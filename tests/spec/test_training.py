"""A recipe that cannot be carried out is refused in one line that names the cure, before anything is loaded."""

import pytest
from pydantic import ValidationError

from fp4rl.spec.experiment import Experiment
from fp4rl.spec.training import Training

REFUSED = [
    ({"algorithm": "ppo"}, "ppo is left out: it needs a critic"),
    ({"algorithm": "dapoo"}, "'dapo', 'grpo', 'dr_grpo', 'gspo' or 'cispo'"),
    ({"train_batch_size": 10}, "train_batch_size 10 is not a multiple of mini_batch_size 8"),
    ({"mini_batch_size": 32}, "train_batch_size 16 is not a multiple of mini_batch_size 32"),
    ({"micro_batch_size": 7}, "micro_batch_size 7 does not divide the 64 answers of one update"),
    ({"micro_batch_size": 128}, "micro_batch_size 128 does not divide the 64 answers of one update"),
    ({"rollout_n": 1}, "greater than or equal to 2"),
    ({"overlong_buffer": {"len": 48}}, "overlong_buffer.len 48 must be below max_response_length 48"),
    ({"rollout_correction": {"rollout_is": "token", "threshold": 1.0}}, "greater than 1"),
    ({"learning_rate": 1e-3}, "learning_rate"),
]


@pytest.mark.parametrize(
    "recipe, said", REFUSED, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_an_impossible_recipe_is_refused(recipe, said):
    with pytest.raises(ValidationError) as caught:
        Training.model_validate(recipe)
    assert said in str(caught.value)


def test_a_warm_up_that_takes_most_of_the_run_is_said():
    assert "more than a fifth" in " ".join(Training(lr_warmup_steps=9).warnings())
    assert Training().warnings() == []


def test_a_checkpoint_that_is_never_written_is_said():
    assert "no checkpoint" in Training(steps=30, save_freq=31).warnings()[0]
    assert Training(steps=30, save_freq=30).warnings() == []


@pytest.mark.parametrize(
    "every, said", [(31, "nothing is judged on the way"), (7, "from step 28 to 30"), (0, ""), (10, ""), (30, "")]
)
def test_evaluations_that_do_not_come_to_the_last_step_are_said(every, said):
    found = Experiment.model_validate({"training": {"steps": 30}, "evaluation": {"test_freq": every}}).warnings()
    assert [said in line for line in found] == [True] * bool(said)
