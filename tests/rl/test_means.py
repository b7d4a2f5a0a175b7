"""A step's metrics are those of its whole batch, however it was cut into micro-batches."""

import pytest
import torch

from fp4rl.rl.step_metrics import StepMeans, joined


def mask(*lengths):
    return (torch.arange(8) < torch.tensor(lengths).unsqueeze(1)).long()


def test_means_weigh_by_tokens_and_a_micro_batch_without_any_has_none_to_give():
    means = StepMeans()
    means.add({"entropy": 1.0, "clip_ratio": 0.5, "policy_loss": 0.25}, mask(8, 7))
    means.add({"entropy": 0.2, "clip_ratio": 0.1, "policy_loss": 0.5}, mask(4, 1))
    means.add({"entropy": 0.0, "clip_ratio": 0.0, "policy_loss": 0.0}, mask(0, 0))
    found = means.take(updates=1)
    assert found == pytest.approx({"entropy": 0.8, "clip_ratio": 0.4, "policy_loss": 0.75})
    assert means.take(updates=1) == {}


def test_what_is_a_mean_over_answers_weighs_by_answers():
    means = StepMeans()
    means.add({"rollout_corr/training_ppl": 3.0}, mask(8, 0))
    means.add({"rollout_corr/training_ppl": 1.0}, mask(1, 2, 1))
    assert means.take(updates=1) == {"rollout_corr/training_ppl": 1.5}


def test_extremes_stay_extremes_and_losses_are_means_over_updates_of_their_sums():
    means = StepMeans()
    for value in (1.0, 4.0, 2.0, 3.0):
        means.add({"ratio/max": value, "rollout_corr/rollout_is_min": value, "kl_loss": value}, mask(int(value)))
    means.add_update(grad_norm=1.0, lr=0.1)
    means.add_update(grad_norm=2.0, lr=0.3)
    assert means.take(updates=2) == pytest.approx(
        {"ratio/max": 4.0, "rollout_corr/rollout_is_min": 1.0, "kl_loss": 5.0, "grad_norm": 1.5, "lr": 0.2}
    )


def test_what_processes_spend_adds_up_and_what_they_see_is_averaged():
    lines = [{"time/cpu_s": 1.0, "tokens/rollout": 30.0, "entropy": 1.0}, {"time/cpu_s": 2.5, "tokens/rollout": 50.0}]
    assert joined(lines) == {"time/cpu_s": 3.5, "tokens/rollout": 80.0, "entropy": 1.0}


def test_nothing_of_a_step_depends_on_how_it_is_cut(run, experiment, monkeypatch):
    """Half of the groups are left out, so that there are micro-batches without any answer."""
    monkeypatch.setattr("fp4rl.rl.fill.groups_with_spread", lambda *_: torch.tensor([True, False, False, True]))

    def first_step(micro_batch_size):
        recipe = {"steps": 1, "micro_batch_size": micro_batch_size, "mini_batch_size": 4, "kl_loss_coef": 0.1}
        filtered = {"filter_groups": {"enable": True, "max_num_gen_batches": 1}}
        described = experiment("w4a16", training={**recipe, **filtered}, evaluation={"count": 1, "profiles": ["full"]})
        (_, metrics) = run(described, f"micro-{micro_batch_size}")[1].steps[0]
        assert metrics["sampling/trained_groups"] == 2
        return [metrics[name] for name in ("entropy", "kl", "kl_loss", "rollout_corr/training_ppl")]

    whole = first_step(None)
    assert min(whole) > 1e-6
    assert first_step(2) == pytest.approx(whole, rel=1e-3)
