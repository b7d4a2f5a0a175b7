"""Advantages: each answer against its own group."""

import pytest
import torch

from fp4rl.rl.generate import Generation
from fp4rl.rl.rollout import Answer, group_advantages, training_batch
from fp4rl.spec.algorithms import ALGORITHMS
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.training import Training

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])  # two groups of four


def test_a_group_is_centred_and_divided_by_its_own_unbiased_deviation():
    found = group_advantages(REWARDS, 4)
    # group 1: mean 1/4, deviation 1/2; group 2: mean 1/2, deviation sqrt(1/3).
    assert found[:4].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)
    assert found[4:].tolist() == pytest.approx([0.866, 0.866, -0.866, -0.866], abs=1e-3)


def test_dr_grpo_does_not_divide():
    assert group_advantages(REWARDS, 4, norm_adv_by_std=False)[:4].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert not ALGORITHMS["dr_grpo"].norm_adv_by_std


def test_leave_one_out_compares_with_the_mean_of_the_others():
    found = group_advantages(REWARDS, 4, "rloo")
    assert found[:4].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_the_batch_deviation_keeps_a_quiet_group_quiet():
    rewards = torch.tensor([0.0, 0.01, 0.0, 1.0])
    by_group = group_advantages(rewards, 2).abs()
    by_batch = group_advantages(rewards, 2, "reinforce_plus_plus_baseline").abs()
    assert by_group[0] > 0.6
    assert by_batch[0] < 0.02


@pytest.mark.parametrize(
    ("recipe", "first", "second"),
    [
        # centred (3/4, -1/4, ...) and (1/2, -1/2, ...); unbiased deviations 1/2 and sqrt(1/3), of the batch 1/2
        ({"adv_estimator": "grpo"}, (1.5, -0.5), (0.866, -0.866)),
        ({"adv_estimator": "grpo", "norm_adv_by_std": False}, (0.75, -0.25), (0.5, -0.5)),
        ({"algorithm": "dr_grpo"}, (0.75, -0.25), (0.5, -0.5)),
        ({"adv_estimator": "rloo"}, (1.0, -1 / 3), (2 / 3, -2 / 3)),
        ({"adv_estimator": "reinforce_plus_plus_baseline"}, (1.5, -0.5), (1.0, -1.0)),
    ],
)
def test_a_step_learns_from_the_advantages_of_its_recipe(recipe, first, second):
    """The kind: `one != other`, which any difference passes, in place of the right values, worked out by hand."""
    answers = [Answer([5], Generation([6], "", True, torch.zeros(1)), reward) for reward in REWARDS.tolist()]
    described = Training.model_validate({"algorithm": "dapo", "rollout_n": 4} | recipe)
    batch = training_batch(answers, answers[0], described, 8, 0, torch.device("cpu"))
    (up, down), (high, low) = first, second
    assert batch["advantages"].tolist() == pytest.approx([up, down, down, down, high, high, low, low], abs=1e-3)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_advantages_of_a_group_sum_to_zero_and_follow_the_reward(estimator):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    values = group_advantages(rewards, 6, estimator).view(4, 6)
    assert values.sum(-1).abs().max() < 1e-5
    assert torch.equal(values.argmax(-1), rewards.view(4, 6).argmax(-1))


def test_equal_rewards_give_no_advantage():
    found = group_advantages(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
    assert found[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_an_answer_that_could_not_be_scored_takes_no_part(estimator):
    with_nan = group_advantages(torch.tensor([1.0, 0.0, 0.0, float("nan")]), 4, estimator)
    without = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3, estimator)
    assert with_nan[:3].tolist() == pytest.approx(without.tolist(), abs=1e-6)
    assert with_nan[3] == 0.0


def test_a_group_nobody_could_score_gives_zeros():
    assert not group_advantages(torch.full((4,), float("nan")), 4).any()


def test_half_precision_rewards_are_averaged_in_float32():
    assert group_advantages(REWARDS.bfloat16(), 4).dtype == torch.float32


@pytest.mark.parametrize("rewards, n", [(torch.zeros(5), 2), (torch.zeros(4), 1), (torch.zeros(2, 2), 2)])
def test_answers_that_do_not_make_groups_are_refused(rewards, n):
    with pytest.raises(InvalidValueError, match="do not make groups"):
        group_advantages(rewards, n)


def test_an_unknown_estimator_is_answered_with_the_nearest():
    with pytest.raises(NotFoundError, match="did you mean 'grpo'"):
        group_advantages(REWARDS, 4, "gprpo")
