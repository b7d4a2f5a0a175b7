"""The overlong penalty: the numbers that TRL's and verl's own test suites expect."""

import json
import warnings

import pytest
import torch

from fp4rl.rl.generate import Generation
from fp4rl.rl.overlong import soft_overlong_penalty
from fp4rl.rl.rollout import Answer, training_batch
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.training import Training


@pytest.fixture(scope="module")
def vectors(shared_data):
    return json.loads((shared_data / "public_vectors.json").read_text())


def test_the_penalty_has_the_numbers_of_trl(vectors):
    case = vectors["soft_overlong_trl"]
    lengths = torch.tensor([int(length) for length in case["len_to_reward"]])
    found = soft_overlong_penalty(lengths, case["max_completion_len"], case["soft_punish_cache"])
    assert found.tolist() == pytest.approx(list(case["len_to_reward"].values()))


def test_the_penalty_has_the_numbers_of_verl(vectors):
    case = vectors["overlong_verl"]
    penalty = soft_overlong_penalty(
        torch.tensor([case["response_len"]]), case["max_resp_len"], case["overlong_len"], case["penalty_factor"]
    )
    assert case["base_score"] + penalty.item() == case["final_score"]


def test_the_penalty_is_trls_at_every_length():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL imports warns while it is compiled for the first time
        from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(48, 12)
    ours = soft_overlong_penalty(torch.arange(60), 48, 12)
    assert ours.tolist() == pytest.approx(theirs(completion_ids=[[0] * n for n in range(60)]))


def test_the_penalty_starts_after_the_free_length_and_scales_with_its_factor():
    lengths = torch.tensor([36, 37, 48])
    assert soft_overlong_penalty(lengths, 48, 12).tolist() == pytest.approx([0.0, -1 / 12, -1.0])
    assert soft_overlong_penalty(lengths, 48, 12, penalty_factor=0.5).tolist() == pytest.approx([0.0, -1 / 24, -0.5])


@pytest.mark.parametrize("buffer", [0, 48, 60])
def test_a_buffer_that_does_not_fit_is_refused(buffer):
    with pytest.raises(InvalidValueError, match="about a quarter"):
        soft_overlong_penalty(torch.tensor([1]), 48, buffer)


def test_masking_takes_whole_answers_out_of_the_loss_alone():
    cut, whole = (Answer([5], Generation([6, 7, 8], "", ended), 1.0) for ended in (False, True))
    recipe = Training(mask_truncated=True, rollout_n=2)
    batch = training_batch([cut, whole], cut, recipe, 2, 0, torch.device("cpu"))
    assert batch["loss_mask"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert batch["completion_mask"].all()
