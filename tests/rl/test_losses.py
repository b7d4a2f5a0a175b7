"""Policy losses on an example small enough to be worked by hand, and what must hold for any batch."""

from dataclasses import replace
from math import log, sqrt

import pytest
import torch

from fp4rl.rl.losses import LossInputs, Whole, aggregate, kl_per_token, loss_named, policy_loss
from fp4rl.spec.algorithms import ALGORITHMS, LOSS_AGGREGATIONS
from fp4rl.spec.errors import InvalidValueError, NotFoundError

DAPO, GRPO, DR_GRPO, GSPO, CISPO = map(loss_named, ("dapo", "grpo", "dr_grpo", "gspo", "cispo"))

# One answer of two tokens. pi_old = 1/2, 1/2; pi = 3/5, 3/10: the ratios are 1.2 and 0.6. pi_ref = 1/2, 3/5.
POLICY, OLD, REFERENCE = (0.6, 0.3), (0.5, 0.5), (0.5, 0.6)


def hand(advantage, rule, reference=None):
    """Loss and gradient of the two-token answer."""
    logps = torch.tensor([POLICY]).log().requires_grad_()
    inputs = LossInputs(
        logps=logps,
        advantages=torch.tensor([advantage]),
        mask=torch.ones(1, 2),
        old_logps=torch.tensor([OLD]).log(),
        ref_logps=None if reference is None else torch.tensor([reference]).log(),
    )
    outputs = policy_loss(inputs, rule)
    outputs.loss.backward()
    return outputs.loss.item(), logps.grad.squeeze(0).tolist(), outputs.metrics


@pytest.mark.parametrize(
    "rule, advantage, loss, gradient",
    [
        # A > 0: min(1.2, clip to 1.28) + min(.6, clip to .8) = 1.8; each gradient is -ratio / 2.
        (DAPO, 1.0, -0.9, (-0.6, -0.3)),
        # A < 0: the second token is already below .8, so the clip holds it: no gradient.
        (DAPO, -1.0, 1.0, (0.6, 0.0)),
        # clip_ratio_high .1: the first token is clipped at 1.1.
        (replace(DAPO, clip_ratio_high=0.1), 1.0, -0.85, (0.0, -0.3)),
        (GRPO, 1.0, -0.9, (-0.6, -0.3)),
        # over a constant of 4 tokens instead of 2.
        (replace(DR_GRPO, loss_scale_factor=4), 1.0, -0.45, (-0.3, -0.15)),
        # the geometric mean sqrt(1.2 * .6) moves both tokens alike.
        (GSPO, 1.0, -sqrt(0.72), (-sqrt(0.72) / 2, -sqrt(0.72) / 2)),
        # ... and for A < 0 it is outside its narrow clip: value 1 - 3e-4, no gradient.
        (GSPO, -1.0, 1 - 3e-4, (0.0, 0.0)),
        # the ratio is only a weight of log pi.
        (CISPO, 1.0, -(1.2 * log(0.6) + 0.6 * log(0.3)) / 2, (-0.6, -0.3)),
        (replace(CISPO, clip_ratio_high=0.1), -1.0, (1.1 * log(0.6) + 0.6 * log(0.3)) / 2, (0.55, 0.3)),
    ],
)
def test_a_two_token_answer_gives_the_loss_and_gradient_worked_by_hand(rule, advantage, loss, gradient):
    found, slope, _ = hand(advantage, rule)
    assert found == pytest.approx(loss, abs=1e-6)
    assert slope == pytest.approx(gradient, abs=1e-6)


def test_the_kl_to_a_reference_adds_its_hand_worked_value_and_gradient():
    # pi_ref / pi = 5/6 and 2; k3 = x - 1 - ln x = .015655 and .306853; its gradient is 1 - x = 1/6 and -1.
    loss, slope, metrics = hand(1.0, replace(DAPO, kl_loss_coef=0.5), REFERENCE)
    assert loss == pytest.approx(-0.9 + 0.5 * (0.0156549 + 0.3068528) / 2, abs=1e-6)
    assert slope == pytest.approx((-0.6 + 0.5 / 12, -0.3 - 0.25), abs=1e-6)
    assert metrics["kl"].item() == pytest.approx((0.0156549 + 0.3068528) / 2, abs=1e-6)


@pytest.mark.parametrize(
    "kind, values",
    [("k1", (log(1.2), log(0.5))), ("abs", (log(1.2), log(2))), ("k2", (log(1.2) ** 2 / 2, log(2) ** 2 / 2))],
)
def test_the_other_kl_estimates_have_their_hand_worked_values(kind, values):
    found = kl_per_token(torch.tensor(POLICY).log(), torch.tensor(REFERENCE).log(), kind)
    assert found.tolist() == pytest.approx(values, abs=1e-6)


def test_a_plus_keeps_the_value_of_k3_and_takes_the_gradient_of_k2():
    logps, reference = torch.tensor(POLICY).log().requires_grad_(), torch.tensor(REFERENCE).log()
    kl = kl_per_token(logps, reference, "k3+")
    kl.sum().backward()
    assert torch.allclose(kl, kl_per_token(logps, reference, "k3"))
    assert logps.grad.tolist() == pytest.approx((log(1.2), log(0.5)), abs=1e-6)


def test_k3_has_its_hand_worked_values_and_averages_to_the_exact_kl():
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05])
    reference = torch.tensor([0.25, 0.25, 0.25, 0.25])
    k3 = kl_per_token(policy.log(), reference.log(), "low_var_kl")
    # reference / policy is 1/2, 5/6, 5/3 and 5; k3 = x - 1 - ln x
    assert k3.tolist() == pytest.approx([0.1931472, 0.0156549, 0.1558410, 2.3905621], abs=1e-6)
    assert (policy * k3).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item(), abs=1e-6)


def test_the_clip_metrics_count_the_tokens_that_the_clip_holds_back():
    metrics = hand(-1.0, DAPO)[2]
    assert metrics["clip_ratio/low"].item() == 0.5
    assert metrics["clip_ratio/high"].item() == 0.0
    assert hand(1.0, replace(DAPO, clip_ratio_high=0.1))[2]["clip_ratio"].item() == 0.5
    assert metrics["ppo_kl"].item() == pytest.approx(-(log(1.2) + log(0.6)) / 2, abs=1e-6)


def batch(seed=0, answers=6, tokens=9, spread=0.5):
    """A random batch with ragged answers; every tensor in float64."""
    random = torch.Generator().manual_seed(seed)
    old = -torch.rand(answers, tokens, generator=random, dtype=torch.float64) * 3
    move = torch.randn(answers, tokens, generator=random, dtype=torch.float64) * spread
    lengths = torch.randint(1, tokens + 1, (answers, 1), generator=random)
    return LossInputs(
        logps=(old + move).requires_grad_(),
        advantages=torch.randn(answers, generator=random, dtype=torch.float64),
        mask=(torch.arange(tokens) < lengths).double(),
        old_logps=old,
        ref_logps=old + torch.randn(answers, tokens, generator=random, dtype=torch.float64) * 0.1,
    )


def concrete(name):
    return replace(loss_named(name), loss_scale_factor=9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_on_policy_is_the_policy_gradient(name):
    """At ratio 1 every loss has the gradient of -A log pi, each under its own weights of tokens."""
    inputs = replace(batch(), old_logps=None)
    rule = concrete(name)
    policy_loss(inputs, rule).loss.backward()
    plain = inputs.logps.detach().clone().requires_grad_()
    per_token = -inputs.advantages.unsqueeze(1) * plain
    aggregate(per_token, inputs.mask, rule.loss_agg_mode, Whole.of(inputs.mask), 9).backward()
    assert torch.allclose(inputs.logps.grad, plain.grad)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_that_share_a_whole_add_up_to_the_batch(name):
    inputs = batch()
    rule = replace(concrete(name), kl_loss_coef=0.1)
    whole = Whole.of(inputs.mask)
    parts = [
        policy_loss(
            LossInputs(
                inputs.logps[rows],
                inputs.advantages[rows],
                inputs.mask[rows],
                inputs.old_logps[rows],
                inputs.ref_logps[rows],
                whole=whole,
            ),
            rule,
        ).loss
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(parts).item() == pytest.approx(policy_loss(inputs, rule).loss.item(), abs=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_stands_in_the_padding_changes_neither_loss_nor_gradient(name):
    clean, dirty = batch(), batch()
    padding = dirty.mask == 0
    poison = dirty.logps.detach().masked_fill(padding, -float("inf")).requires_grad_()
    dirty = replace(dirty, logps=poison, old_logps=dirty.old_logps.masked_fill(padding, 0.0))
    rule = concrete(name)
    clean_loss, dirty_loss = policy_loss(clean, rule).loss, policy_loss(dirty, rule).loss
    clean_loss.backward()
    dirty_loss.backward()
    assert dirty_loss.item() == pytest.approx(clean_loss.item(), abs=1e-12)
    assert torch.allclose(poison.grad, clean.logps.grad)


def test_a_group_of_advantage_zero_gives_no_gradient():
    inputs = replace(batch(), advantages=torch.zeros(6, dtype=torch.float64))
    policy_loss(inputs, DAPO).loss.backward()
    assert not inputs.logps.grad.any()


def test_importance_weights_scale_each_token_and_carry_no_gradient():
    inputs = batch()
    weights = torch.full_like(inputs.mask, 0.25).requires_grad_()
    weighted = policy_loss(replace(inputs, weights=weights), DAPO).loss
    assert weighted.item() == pytest.approx(policy_loss(inputs, DAPO).loss.item() / 4)
    weighted.backward()
    assert weights.grad is None


def test_an_exploded_ratio_stays_finite():
    inputs = batch()
    far = replace(inputs, logps=(inputs.old_logps + 500.0).float().requires_grad_())
    assert policy_loss(far, DAPO).loss.isfinite()


def test_an_answer_masked_out_entirely_counts_in_no_mean():
    inputs = batch()
    first_gone = replace(inputs, mask=torch.cat([torch.zeros(1, 9), inputs.mask[1:]]).double())
    without = LossInputs(inputs.logps[1:], inputs.advantages[1:], inputs.mask[1:], inputs.old_logps[1:])
    for mode in LOSS_AGGREGATIONS:
        rule = replace(DAPO, loss_agg_mode=mode, loss_scale_factor=9)
        assert policy_loss(first_gone, rule).loss.item() == pytest.approx(policy_loss(without, rule).loss.item())


def test_a_batch_with_nothing_in_it_gives_zero_and_not_nan():
    inputs = batch()
    outputs = policy_loss(replace(inputs, mask=torch.zeros_like(inputs.mask)), DAPO)
    assert outputs.loss.item() == 0.0
    assert all(value.isfinite() for value in outputs.metrics.values())


def test_token_mean_weighs_tokens_and_seq_mean_weighs_answers():
    losses, mask = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    whole = Whole.of(mask)
    assert aggregate(losses, mask, "token-mean", whole).item() == 2.0
    assert aggregate(losses, mask, "seq-mean-token-mean", whole).item() == 3.0
    assert aggregate(losses, mask, "seq-mean-token-sum", whole).item() == 4.0
    assert aggregate(losses, mask, "seq-mean-token-sum-norm", whole, 8).item() == 0.5


def test_mistakes_name_their_cure():
    inputs = batch()
    with pytest.raises(NotFoundError, match="did you mean 'dr_grpo'"):
        loss_named("dr-grpo")
    with pytest.raises(NotFoundError, match="did you mean 'token-mean'"):
        policy_loss(inputs, replace(DAPO, loss_agg_mode="token_mean"))
    with pytest.raises(InvalidValueError, match="set loss_scale_factor"):
        policy_loss(inputs, DR_GRPO)
    with pytest.raises(InvalidValueError, match="no reference"):
        policy_loss(replace(inputs, ref_logps=None), replace(DAPO, kl_loss_coef=0.1))
    with pytest.raises(InvalidValueError, match="differ in shape"):
        policy_loss(replace(inputs, mask=inputs.mask[:, 1:]), DAPO)
