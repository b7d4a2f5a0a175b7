"""Every policy loss against TRL's own `_compute_loss`, on random batches: values and gradients."""

import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fp4rl.rl.losses import LossInputs, Whole, loss_named, policy_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL imports warns while it is compiled for the first time
    from trl.trainer.grpo_trainer import GRPOTrainer

DAPO, GRPO, DR_GRPO, GSPO, CISPO = map(loss_named, ("dapo", "grpo", "dr_grpo", "gspo", "cispo"))
ANSWERS, TOKENS = 8, 11


class _OneProcess:
    num_processes = 1

    @staticmethod
    def gather(value):
        return value

    @staticmethod
    def reduce(value, reduction):  # noqa: ARG004
        return value


def trl_loss(inputs, loss_type, rule, level="token"):
    """The loss TRL computes for these log-probs: its own method on a stand-in that holds the settings it reads."""
    logps = inputs.logps
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=rule.kl_loss_coef,
        loss_type=loss_type,
        # TRL's CISPO bounds the ratio itself; PPO's bound is a distance from 1, as in verl.
        epsilon_high=rule.clip_ratio_high + (loss_type == "cispo"),
        epsilon_low=rule.clip_ratio_low,
        max_completion_length=TOKENS,
        use_vllm=inputs.weights is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=_OneProcess(),
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=rule.clip_ratio_c, use_bias_correction_kl=False, steps_per_generation=1),
    )
    nothing = torch.zeros(ANSWERS, 0, dtype=torch.long)
    batch = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros(ANSWERS, TOKENS, dtype=torch.long),
        "completion_mask": inputs.mask,
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logps,
        "ref_per_token_logps": inputs.ref_logps,
        "num_items_in_batch": inputs.mask.sum(),
        "importance_sampling_ratio": inputs.weights,
    }
    return GRPOTrainer._compute_loss(stand_in, None, batch), stand_in._metrics["train"]


def batch(seed):
    random = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(ANSWERS, TOKENS, generator=random, dtype=torch.float64)

    old = -torch.rand(ANSWERS, TOKENS, generator=random, dtype=torch.float64) * 3
    lengths = torch.randint(1, TOKENS + 1, (ANSWERS, 1), generator=random)
    return LossInputs(
        logps=(old + 0.4 * normal()).requires_grad_(),
        advantages=torch.randn(ANSWERS, generator=random, dtype=torch.float64),
        mask=(torch.arange(TOKENS) < lengths).double(),
        old_logps=old,
        ref_logps=old + 0.3 * normal(),
    )


# our rule, TRL's loss_type, TRL's importance_sampling_level
PAIRS = {
    "dapo": (DAPO, "dapo", "token"),
    "grpo": (GRPO, "grpo", "token"),
    "grpo with a KL": (replace(GRPO, kl_loss_coef=0.07), "grpo", "token"),
    "dapo with a KL": (replace(DAPO, kl_loss_coef=0.07), "dapo", "token"),
    "dapo with a dual clip": (replace(DAPO, clip_ratio_c=1.5), "dapo", "token"),
    "token mean of one batch": (DAPO, "bnpo", "token"),
    "dr_grpo": (replace(DR_GRPO, loss_scale_factor=TOKENS), "dr_grpo", "token"),
    "gspo": (GSPO, "grpo", "sequence"),
    "gspo with wide bounds and a KL": (
        replace(GSPO, clip_ratio_low=0.1, clip_ratio_high=0.1, kl_loss_coef=0.07),
        "grpo",
        "sequence",
    ),
    "gspo under the token mean": (
        replace(GSPO, clip_ratio_low=0.1, clip_ratio_high=0.1, loss_agg_mode="token-mean"),
        "dapo",
        "sequence",
    ),
    "cispo": (CISPO, "cispo", "token"),
    "cispo that clips": (replace(CISPO, clip_ratio_high=0.1), "cispo", "token"),
}


def both(pair, seed, change=lambda inputs: inputs):
    rule, loss_type, level = PAIRS[pair]
    ours, theirs = change(batch(seed)), change(batch(seed))
    outputs = policy_loss(ours, rule)
    loss, metrics = trl_loss(theirs, loss_type, rule, level)
    outputs.loss.backward()
    loss.backward()
    return (outputs.loss, ours.logps.grad, outputs.metrics), (loss, theirs.logps.grad, metrics)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pair", PAIRS)
def test_value_and_gradient_are_those_of_trl(pair, seed):
    (loss, gradient, _), (their_loss, their_gradient, _) = both(pair, seed)
    assert torch.allclose(loss, their_loss, rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient, their_gradient, rtol=1e-10, atol=1e-12)
    assert gradient.abs().max() > 1e-3 or pair == "gspo"  # GSPO's own bounds clip nearly all of it


@pytest.mark.parametrize("pair", PAIRS)
def test_the_comparison_would_notice_a_flipped_advantage(pair):
    rule, loss_type, level = PAIRS[pair]
    ours, theirs = batch(0), batch(0)
    policy_loss(replace(ours, advantages=-ours.advantages), rule).loss.backward()
    trl_loss(theirs, loss_type, rule, level)[0].backward()
    assert not torch.allclose(ours.logps.grad, theirs.logps.grad, rtol=1e-3, atol=1e-6)


def test_the_first_update_needs_no_old_log_probs_and_agrees_with_trl():
    (loss, gradient, _), (their_loss, their_gradient, _) = both("dapo", 1, lambda i: replace(i, old_logps=None))
    assert torch.allclose(loss, their_loss)
    assert torch.allclose(gradient, their_gradient)


def test_importance_weights_of_the_sampler_enter_as_in_trl():
    weights = torch.rand(ANSWERS, TOKENS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    (loss, gradient, _), (their_loss, their_gradient, _) = both("dapo", 1, lambda i: replace(i, weights=weights))
    assert torch.allclose(loss, their_loss)
    assert torch.allclose(gradient, their_gradient)


def test_clip_and_kl_metrics_are_those_of_trl():
    (_, _, ours), (_, _, theirs) = both("dapo with a KL", 2)
    assert ours["clip_ratio/low"].item() == pytest.approx(theirs["clip_ratio/low_mean"][0])
    assert ours["clip_ratio/high"].item() == pytest.approx(theirs["clip_ratio/high_mean"][0])
    assert ours["clip_ratio"].item() == pytest.approx(theirs["clip_ratio/region_mean"][0])
    assert ours["kl"].item() == pytest.approx(theirs["kl"][0])
    assert ours["clip_ratio"].item() > 0


def test_trl_counts_masked_out_answers_in_the_mean_and_so_do_we_when_told():
    def first_masked(inputs):
        mask = inputs.mask.clone()
        mask[0] = 0
        return replace(inputs, mask=mask)

    ours, theirs = first_masked(batch(4)), first_masked(batch(4))
    counted = replace(ours, whole=Whole(tokens=ours.mask.sum(), sequences=ANSWERS))
    assert torch.allclose(policy_loss(counted, GRPO).loss, trl_loss(theirs, "grpo", GRPO)[0])
    assert not torch.allclose(policy_loss(ours, GRPO).loss, trl_loss(theirs, "grpo", GRPO)[0])
