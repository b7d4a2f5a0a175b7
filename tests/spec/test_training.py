"""A recipe that cannot be carried out is refused in one line that names the cure, before anything is loaded."""

import pytest
from pydantic import ValidationError

from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import arm_contents, merge
from fp4rl.spec.training import Training

REFUSED = [
    ({"algorithm": "ppo"}, "ppo is left out: it needs a critic"),
    ({"algorithm": "dapoo"}, "'dapo', 'grpo', 'dr_grpo', 'gspo' or 'cispo'"),
    ({"train_batch_size": 10}, "train_batch_size 10 is not a multiple of mini_batch_size 8"),
    ({"mini_batch_size": 32}, "train_batch_size 16 is not a multiple of mini_batch_size 32"),
    ({"micro_batch_size": 7}, "micro_batch_size 7 does not divide the 64 answers of one update"),
    ({"micro_batch_size": 128}, "micro_batch_size 128 does not divide the 64 answers of one update"),
    ({"rollout_n": 1}, "greater than or equal to 2"),
    (
        {"overlong_buffer": {"len": 48}, "max_response_length": 48},
        "overlong_buffer.len 48 must be below max_response_length 48",
    ),
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
    assert not list(Training().warnings())


def test_a_checkpoint_that_is_never_written_is_said():
    assert "no checkpoint" in next(Training(steps=30, save_freq=31).warnings())
    assert not list(Training(steps=30, save_freq=30).warnings())


@pytest.mark.parametrize(
    "every, said", [(31, "nothing is judged on the way"), (7, "from step 28 to 30"), (0, ""), (10, ""), (30, "")]
)
def test_evaluations_that_do_not_come_to_the_last_step_are_said(every, said):
    found = list(Experiment.model_validate({"training": {"steps": 30}, "evaluation": {"test_freq": every}}).warnings())
    assert [said in line for line in found] == [True] * bool(said)


# low, high, aggregation, over std, KL, filter, overlong; from the papers: DAPO 2503.14476 (3.1-3.4), DeepSeekMath
# 2402.03300 (4.2), Dr. GRPO 2503.20783 (3.2), GSPO 2507.18071 (5.1), MiniMax-M1 2506.13585 (3.1) and 2510.13786.
PAPERS = {
    "dapo": (0.2, 0.28, "token-mean", True, 0.0, True, True),
    "grpo": (0.2, 0.2, "seq-mean-token-mean", True, 0.04, False, False),
    "dr_grpo": (0.2, 0.2, "seq-mean-token-sum-norm", False, 0.0, False, False),
    "gspo": (3e-4, 4e-4, "seq-mean-token-mean", True, 0.0, False, False),
    "cispo": (1.0, 4.0, "token-mean", True, 0.0, True, True),
}


@pytest.mark.parametrize("algorithm", PAPERS)
def test_an_algorithm_is_what_its_paper_says_unless_a_key_says_otherwise(algorithm):
    """Parts of one algorithm under the name of another: GRPO had DAPO's sampling and punishment."""
    recipe = Training(algorithm=algorithm)
    found = recipe.effective()
    numbers = [found[key] for key in ("clip_ratio_low", "clip_ratio_high", "loss_agg_mode", "norm_adv_by_std")]
    assert (*numbers, recipe.kl, recipe.filters, recipe.overlong is not None) == PAPERS[algorithm]
    named = {"filter_groups": {"enable": not recipe.filters}, "overlong_buffer": {"enable": not recipe.filters}}
    other = Training.model_validate({"algorithm": algorithm, "kl_loss_coef": 0.5, "clip_ratio_high": 0.3, **named})
    assert (other.filters, other.overlong is not None) == (not recipe.filters, not recipe.filters)
    assert (other.kl, other.effective()["clip_ratio_high"]) == (0.5, 0.3)


def test_the_overlong_buffer_is_dapos_share_of_the_cap():
    assert Training(max_response_length=20480).overlong == 4096
    assert Training.model_validate({"overlong_buffer": {"len": 12}}).overlong == 12


@pytest.mark.parametrize(
    "model, lr, longest",
    [
        (None, 4e-4, 48),
        ({"embedded": {"seed": 1}}, 4e-4, 48),
        ("embedded-m", 1e-4, 52),
        ({"embedded": {"size": "m", "seed": 1}}, 1e-4, 52),
        ("models/real", 1e-6, 1024),
        ({"path": "models/real", "lora": {}}, 1e-5, 1024),
    ],
)
def test_a_real_model_does_not_get_the_numbers_of_the_small_one(model, lr, longest):
    """Defaults that were found for the embedded model: a learning rate 400 times too high for a real one."""
    content = {"model": model} if model else {}
    found = Experiment.model_validate(content)
    assert (found.training.lr, found.training.max_response_length) == (lr, longest)
    assert found.evaluation.max_new_tokens == longest
    named = content | {"training": {"lr": 1e-3, "max_response_length": 77}}
    recipe = Experiment.model_validate(named)
    assert (recipe.training.lr, recipe.training.max_response_length, recipe.evaluation.max_new_tokens) == (1e-3, 77, 77)
    assert Experiment.model_validate(found.model_dump()) == found


def test_a_size_gives_defaults_which_named_keys_go_before():
    """`model: embedded` is what it was, to the byte of its description."""
    small, middle = Experiment.model_validate({"model": "embedded"}), Experiment.model_validate({"model": "embedded-m"})
    assert small == Experiment() == Experiment.model_validate({"model": {"embedded": {"size": "s"}}})
    assert "size" not in small.model_dump()["model"]["embedded"]
    assert (small.task.difficulty, middle.task.difficulty) == (2, 6)
    own = {"model": {"embedded": {"size": "m", "num_layers": 5}}, "task": {"difficulty": 4}}
    named = Experiment.model_validate(own)
    assert (named.model.embedded.num_layers, named.model.embedded.hidden_size, named.task.difficulty) == (5, 256, 4)
    assert merge({"model": "embedded-m"}, {"model.embedded.num_layers": 5})["model"] == own["model"]
    assert digest(small.model_dump(mode="json")) == "eca6bf890676"


def test_arms_of_other_models_in_one_suite_get_each_its_own():
    suite = Suite.model_validate({"suite": "s", "arms": {"small": {}, "real": {"model": {"path": "models/real"}}}})
    assert [e.training.lr for _, e in arm_contents(suite)] == [4e-4, 1e-6]
