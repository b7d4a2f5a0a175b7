"""Rollout mismatch: weights and metrics on numbers worked by hand, and what must hold for any two policies."""

from math import exp, log

import pytest
import torch

from fp4rl.rl.mismatch import correct_rollout, mismatch_metrics
from fp4rl.spec.errors import InvalidValueError

# Two answers, the second of one token: ratios 3, 1/2 and 1.2.
ROLLOUT = torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log()
TRAIN = torch.tensor([[0.6, 0.4], [0.6, 0.5]]).log()
MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0]])


def weights(level, mode, threshold=2.0):
    return correct_rollout(TRAIN, ROLLOUT, MASK, level, mode, threshold).weights


def test_token_weights_are_cut_at_the_threshold():
    assert weights("token", "truncate").tolist() == [pytest.approx([2.0, 0.5]), pytest.approx([1.2, 1.0])]


def test_masked_token_weights_are_zero_outside_the_band():
    assert weights("token", "mask", 2.5).tolist() == [pytest.approx([0.0, 0.5]), pytest.approx([1.2, 1.0])]
    assert weights("token", "mask", 1.5).tolist() == [pytest.approx([0.0, 0.0]), pytest.approx([1.2, 1.0])]


def test_sequence_weights_are_the_product_over_the_answer():
    assert weights("sequence", "truncate").flatten().tolist() == pytest.approx([1.5, 1.2])
    assert weights("sequence", "mask", 1.4).flatten().tolist() == pytest.approx([0.0, 1.2])


def test_weights_turn_expectations_under_the_sampler_into_those_of_the_trained_policy():
    random = torch.Generator().manual_seed(0)
    sampler, trained = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    value = torch.tensor([1.0, 5.0, -2.0])
    tokens = torch.multinomial(sampler, 200_000, replacement=True, generator=random)
    logps = [p.log()[tokens].unsqueeze(0) for p in (trained, sampler)]
    rho = correct_rollout(*logps, torch.ones(1, len(tokens)), threshold=10.0).weights
    assert (rho * value[tokens]).mean().item() == pytest.approx((trained * value).sum().item(), abs=0.02)


def test_the_metrics_have_their_hand_worked_values():
    found = mismatch_metrics(TRAIN, ROLLOUT, MASK)
    rho = (3.0, 0.5, 1.2)
    assert found["rollout_corr/kl"] == pytest.approx(-sum(log(r) for r in rho) / 3, abs=1e-6)
    assert found["rollout_corr/k3_kl"] == pytest.approx(sum(r - 1 - log(r) for r in rho) / 3, abs=1e-6)
    assert found["rollout_corr/logp_diff_mean"] == pytest.approx(sum(abs(log(r)) for r in rho) / 3, abs=1e-6)
    assert found["rollout_corr/logp_diff_max"] == pytest.approx(log(3), abs=1e-6)
    assert found["rollout_corr/logp_diff_over_0.01"] == 1.0
    assert found["rollout_corr/chi2_token"] == pytest.approx(sum(r * r for r in rho) / 3 - 1, abs=1e-6)
    assert found["rollout_corr/chi2_seq"] == pytest.approx((1.5**2 + 1.2**2) / 2 - 1, abs=1e-6)
    drift = (-log(1.5) / 2, -log(1.2))
    assert found["rollout_corr/log_ppl_diff"] == pytest.approx(sum(drift) / 2, abs=1e-6)
    assert found["rollout_corr/log_ppl_abs_diff"] == pytest.approx(-sum(drift) / 2, abs=1e-6)
    assert found["rollout_corr/ppl_ratio"] == pytest.approx((exp(drift[0]) + exp(drift[1])) / 2, abs=1e-6)
    assert found["rollout_corr/rollout_ppl"] == pytest.approx((0.16**-0.5 + 2.0) / 2, abs=1e-5)
    assert found["training/rollout_probs_diff_mean"] == pytest.approx((0.4 + 0.4 + 0.1) / 3, abs=1e-6)
    assert found["training/rollout_probs_diff_max"] == pytest.approx(0.4, abs=1e-6)


def test_k3_estimates_the_divergence_of_the_trained_policy_from_the_sampler():
    random = torch.Generator().manual_seed(1)
    sampler, trained = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.4, 0.3])
    tokens = torch.multinomial(sampler, 100_000, replacement=True, generator=random)
    logps = [p.log()[tokens].unsqueeze(0) for p in (trained, sampler)]
    found = mismatch_metrics(*logps, torch.ones(1, len(tokens)))
    exact = (sampler * (sampler / trained).log()).sum().item()
    assert found["rollout_corr/k3_kl"] == pytest.approx(exact, rel=0.02)
    assert found["rollout_corr/kl"] == pytest.approx(exact, rel=0.05)


def test_a_single_token_has_no_deviation():
    one = mismatch_metrics(TRAIN[:1, :1], ROLLOUT[:1, :1], MASK[:1, :1])
    assert one["rollout_corr/log_ppl_abs_diff"] == pytest.approx(abs(log(3)), abs=1e-6)
    assert one["training/rollout_probs_diff_std"] == 0.0


def test_equal_policies_show_no_mismatch_and_get_weight_one():
    found = mismatch_metrics(TRAIN, TRAIN, MASK)
    assert found["rollout_corr/logp_diff_max"] == found["rollout_corr/logp_diff_over_0.01"] == 0.0
    assert found["rollout_corr/k3_kl"] == found["rollout_corr/chi2_seq"] == 0.0
    assert found["rollout_corr/ppl_ratio"] == 1.0
    correction = correct_rollout(TRAIN, TRAIN, MASK)
    assert (correction.weights == 1).all()
    assert correction.metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1.0)


def test_padding_and_tokens_the_sampler_could_not_score_change_nothing():
    nan, inf = float("nan"), float("inf")
    dirty = ROLLOUT.clone()
    dirty[1, 1] = inf
    assert mismatch_metrics(TRAIN, dirty, MASK) == mismatch_metrics(TRAIN, ROLLOUT, MASK)
    dirty[0, 1] = nan
    assert correct_rollout(TRAIN, dirty, MASK).weights[0].tolist() == pytest.approx([2.0, 1.0])
    assert all(value == value for value in mismatch_metrics(TRAIN, dirty, MASK).values())


def test_an_answer_without_a_counted_token_is_left_out():
    mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert mismatch_metrics(TRAIN, ROLLOUT, mask) == pytest.approx(
        mismatch_metrics(TRAIN[:1], ROLLOUT[:1], mask[:1]), abs=1e-6
    )
    assert mismatch_metrics(TRAIN, ROLLOUT, torch.zeros(2, 2)) == {}
    assert correct_rollout(TRAIN, ROLLOUT, torch.zeros(2, 2)).metrics == {}


def test_the_shares_outside_the_band_are_counted_before_the_cut():
    metrics = correct_rollout(TRAIN, ROLLOUT, MASK, threshold=1.9).metrics
    assert metrics["rollout_corr/rollout_is_ratio_fraction_high"] == pytest.approx(1 / 3)
    assert metrics["rollout_corr/rollout_is_ratio_fraction_low"] == pytest.approx(1 / 3)
    assert metrics["rollout_corr/rollout_is_max"] == pytest.approx(1.9)


def test_a_long_answer_does_not_overflow():
    far = torch.full((1, 5000), -8.0)
    found = mismatch_metrics(far + 2, far, torch.ones(1, 5000))
    assert all(abs(value) < float("inf") for value in found.values())
    assert correct_rollout(far + 2, far, torch.ones(1, 5000), "sequence").weights.item() == 2.0


def test_mistakes_name_their_cure():
    with pytest.raises(InvalidValueError, match="take 2 or more"):
        correct_rollout(TRAIN, ROLLOUT, MASK, threshold=1.0)
    with pytest.raises(InvalidValueError, match="must have one shape"):
        mismatch_metrics(TRAIN, ROLLOUT[:, :1], MASK)
