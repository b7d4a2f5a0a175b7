"""The parts of the monitor: what it reads, what each check thinks, rules of one's own, and policies."""

from dataclasses import replace
from random import Random

import pytest
from pydantic import ValidationError

from fp4rl.rl.health.checks import CHECKS as RECORDS
from fp4rl.rl.health.checks import Check
from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.histories import SignalHistories, SignalHistory, grain, trend
from fp4rl.rl.health.mechanics import gradient
from fp4rl.rl.health.monitor import Monitor, action
from fp4rl.rl.health.signals import NAMES, signals_of
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.health import CHECKS, Health, Rule, Thresholds


def judged(check, **signals):
    """The verdict of one check after the histories of `signals` (equally long lists; None leaves a step out)."""
    histories = SignalHistories()
    for step, values in enumerate(zip(*signals.values(), strict=True)):
        histories.add(step, {name: v for name, v in zip(signals, values, strict=True) if v is not None})
    return RECORDS[check].function(histories, Thresholds())


def judged_of_16(**signals):
    """The verdict on spread where a step has 16 groups."""
    return judged("no_spread", **signals, groups=[16.0] * len(signals["no_spread"]))


# -- signals


def test_the_same_signal_is_known_under_the_names_of_three_trainers():
    ours = signals_of({"response_length/mean": 20.0, "entropy": 0.1, "accuracy/rollout": 0.5})
    verl = signals_of({"actor/entropy": 0.1, "response_length/mean": 20.0, "critic/rewards/mean": 0.5})
    trl = signals_of({"entropy": 0.1, "completions/mean_length": 20.0, "reward": 0.5, "frac_reward_zero_std": 0.25})
    assert ours["length"] == verl["length"] == trl["length"] == 20.0
    assert ours["entropy"] == verl["entropy"] == trl["entropy"] == 0.1
    assert trl["no_spread"] == 0.25


def test_validations_of_verl_are_averaged_over_data_sets():
    metrics = {
        "val-core/openai/gsm8k/reward/mean@1": 0.8,
        "val-core/math/acc/mean@4": 0.4,
        "val-aux/x/score/mean@1": 9.0,
    }
    assert signals_of(metrics)["validation"] == pytest.approx(0.6)
    assert signals_of({"val/test_score/openai/gsm8k": 0.7})["validation"] == 0.7


def test_a_score_between_0_and_1_stands_in_for_accuracy_and_no_other_reward_does():
    share = {"critic/rewards/mean": 0.3, "critic/score/min": 0.0, "critic/score/max": 1.0}
    assert signals_of(share)["accuracy"] == 0.3
    assert "accuracy" not in signals_of({**share, "critic/score/min": -1.0})
    assert "accuracy" not in signals_of({"reward/mean": 0.3})


def test_a_step_without_an_update_measures_no_entropy():
    metrics = {"entropy": 0.0, "grad_norm": 0.0, "accuracy/rollout": 0.0, "sampling/trained_groups": 0.0}
    assert signals_of(metrics) == {"accuracy": 0.0}
    assert set(signals_of({**metrics, "sampling/trained_groups": 3.0})) == {"entropy", "grad_norm", "accuracy"}


# -- the course of a signal


def course(*values):
    found = SignalHistory()
    for step, value in enumerate(values):
        found.add(step, value)
    return found


def test_early_is_the_median_of_the_first_quarter_up_to_a_limit():
    assert course(1, 2, 3).early(20) is None
    assert course(1, 2, 3, 9).early(20) == 2
    assert course(*range(16)).early(20) == 1.5
    assert course(*range(100)).early(20) == 9.5


def test_noise_is_blind_to_a_trend_and_to_a_single_jump():
    random = Random(0)
    wiggle = [random.gauss(0, 0.1) for _ in range(30)]
    plain = course(*wiggle).noise()
    assert plain == pytest.approx(0.1, rel=0.5)
    assert course(*[w + i for i, w in enumerate(wiggle)]).noise() == pytest.approx(plain)
    assert course(*wiggle[:15], *[w + 50 for w in wiggle[15:]]).noise() == pytest.approx(plain, rel=0.2)


def test_lowest_is_a_running_median_and_not_a_single_value():
    found = course(1, 1, 1, 1, 9, 1, 1, 1, -9, 1)
    assert found.lowest == 1


def test_values_that_are_not_finite_are_left_out():
    assert course(1.0, float("nan"), float("inf"), 2.0).values == [1.0, 2.0]


def test_a_robust_line_ignores_an_outlier():
    level, slope = trend([0.0, 1.0, 2.0, 30.0, 4.0, 5.0])
    assert slope == pytest.approx(1.0)
    assert level == pytest.approx(5.0)


# -- checks


def test_a_check_that_looks_at_an_unknown_signal_is_refused_where_it_is_written():
    with pytest.raises(InvalidValueError, match="gradient: no signal 'grad_nrom'; did you mean 'grad_norm'"):
        Check(gradient, signals=("grad_nrom",), needs=())


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_without_its_data_keeps_still_and_says_that_it_did_not_judge(check):
    monitor = Monitor()
    assert monitor.observe(1, {"time/step_s": 1.0}) == []
    finding = {f.check: f for f in monitor.findings()}[check]
    assert finding.state == "not judged"
    assert finding.evidence.startswith("needs ")
    assert monitor.state == "not judged"


def test_a_check_that_can_do_without_a_metric_is_judged_without_it():
    monitor = Monitor()
    monitor.observe(1, {"reward/mean": 0.5})
    states = {f.check: (f.state, f.evidence) for f in monitor.findings()}
    assert states["accuracy_collapse"] == ("ok", "no accuracy or validation logged, goes by reward 0.5 -> 0.5")
    assert states["reward_hacking"][0] == "not judged"
    assert "accuracy/rollout" in states["reward_hacking"][1]
    assert monitor.state == "ok"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["grad_norm", "policy_loss", "entropy", "reward/mean"])
def test_a_value_that_is_no_number_is_an_alarm_at_once_and_stops_the_run(name, value):
    (finding,) = Monitor().observe(7, {name: value})
    assert (finding.check, finding.state, finding.step) == ("not_a_number", "alarm", 7)
    assert action([finding]) == "stop"


def test_length_needs_harm_to_be_an_alarm():
    longer, steady = [20.0] * 10 + [40.0] * 5, [0.5] * 15
    assert judged("length_explosion", length=longer, accuracy=steady).state == "ok"
    assert judged("length_explosion", length=longer, truncated=[0.0] * 10 + [0.3] * 5).state == "watch"
    assert judged("length_explosion", length=longer, truncated=[0.0] * 10 + [0.9] * 5).state == "alarm"
    assert judged("length_explosion", length=longer, accuracy=[0.5] * 10 + [0.1] * 5).state == "alarm"


def test_answers_that_were_always_cut_off_do_not_make_growth_an_explosion():
    verdict = judged("length_explosion", length=[20.0] * 10 + [31.0] * 5, truncated=[0.5] * 10 + [0.55] * 5)
    assert verdict.state != "alarm"


def test_accuracy_within_its_own_noise_has_not_collapsed():
    noisy = [0.3, 0.05, 0.35, 0.1, 0.4, 0.08, 0.3, 0.12, 0.33, 0.1]
    assert judged("accuracy_collapse", accuracy=noisy).state == "ok"


def test_accuracy_that_never_was_high_can_still_collapse():
    assert judged("accuracy_collapse", accuracy=[0.12] * 8 + [0.025]).state == "alarm"
    assert judged("accuracy_collapse", accuracy=[0.04] * 8 + [0.0]).state == "ok"


def test_rollouts_far_below_validation_are_an_alarm():
    fine = judged("accuracy_collapse", accuracy=[0.1] * 5, validation=[0.2] + [None] * 4)
    ill = judged("accuracy_collapse", accuracy=[0.008] * 5, validation=[0.19] + [None] * 4)
    assert (fine.state, ill.state) == ("ok", "alarm")


def test_reward_is_the_goal_where_nobody_logs_accuracy():
    assert judged("accuracy_collapse", reward=[0.6] * 8 + [0.1]).state == "alarm"
    assert judged("accuracy_collapse", reward=[-0.6] * 8 + [-1.0]).state == "ok"


def test_reward_that_rises_while_accuracy_falls_is_hacked():
    reward = [0.5] * 10 + [0.8] * 5
    assert judged("reward_hacking", reward=reward, accuracy=[0.5] * 10 + [0.2] * 5).state == "alarm"
    assert judged("reward_hacking", reward=reward, accuracy=[0.5] * 10 + [0.8] * 5).state == "ok"


@pytest.mark.parametrize(("groups", "steps"), [(16.0, 1), (8.0, 2), (1.0, 16)])
def test_a_reward_that_wrong_answers_earn_is_seen_before_anything_is_lost(groups, steps):
    """Kind: a fall that needs a level to fall from. Sixteen groups say it; logs without it are as before."""
    known = {"reward": [0.5] * steps, "accuracy": [0.5] * steps, "groups": [groups] * steps}
    found = judged("reward_hacking", **known, reward_accuracy=[-0.9] * steps)
    assert (found.state, "correlation -0.90" in found.evidence) == ("alarm", True)
    for others in ([0.9] * steps, [-0.9] * (steps - 1) + [9.0], [None] * steps):
        assert judged("reward_hacking", **known, reward_accuracy=others).state == "ok"


def test_reward_that_has_nothing_to_do_with_accuracy_is_no_alarm():
    """Four answers of one prompt correlate by chance from -1 to 1: sixteen of such steps do not."""
    random = Random(3)
    monitor = Monitor()
    for step in range(1, 2001):
        rewards, right = ([random.gauss(0, 1) for _ in range(4)] for _ in range(2))
        x, y = ([v - sum(values) / 4 for v in values] for values in (rewards, right))
        r = sum(a * b for a, b in zip(x, y, strict=True)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5
        monitor.observe(step, {"rollout/groups": 1.0, "reward/accuracy_correlation": r})
    assert [alarm for alarm in monitor.alarms if alarm.check == "reward_hacking"] == []


def test_reward_that_rises_while_validation_falls_or_stands_is_noticed():
    reward = [0.5 + 0.02 * i for i in range(20)]

    def validation(*values):
        return [v for value in values for v in (value, None, None)][:20]

    assert (
        judged("reward_hacking", reward=reward, validation=validation(0.5, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5)).state
        == "alarm"
    )
    assert (
        judged("reward_hacking", reward=reward, validation=validation(0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.59)).state
        == "watch"
    )
    assert (
        judged("reward_hacking", reward=reward, validation=validation(0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.8)).state == "ok"
    )


def test_entropy_that_falls_with_its_trend_is_no_collapse_and_off_its_trend_is():
    fading = [0.3 * 0.95**i for i in range(60)]
    assert judged("entropy_collapse", entropy=fading, accuracy=[0.5] * 60).state == "ok"
    dropped = [0.3] * 50 + [0.3 * 0.4**i for i in range(1, 6)]
    assert judged("entropy_collapse", entropy=dropped, accuracy=[0.5] * 55).state == "alarm"
    rising = [0.5] * 48 + [0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85]
    assert judged("entropy_collapse", entropy=dropped, accuracy=rising).state == "watch"


def test_rising_entropy_is_an_alarm_only_when_accuracy_pays_for_it():
    up = [0.1] * 10 + [0.2] * 5
    assert judged("entropy_explosion", entropy=up, accuracy=[0.5] * 15).state == "ok"
    assert judged("entropy_explosion", entropy=up, accuracy=[0.5] * 10 + [0.2] * 5).state == "alarm"
    assert judged("entropy_explosion", entropy=[0.1] * 10 + [0.9] * 5, accuracy=[0.5] * 15).state == "alarm"


def test_a_signal_that_is_zero_throughout_breaks_no_check():
    zeros = [0.0] * 20
    for check in CHECKS:
        judged(check, **dict.fromkeys(NAMES, zeros))


def test_a_gradient_spike_is_a_watch_and_one_that_costs_accuracy_an_alarm():
    spike = [0.1] * 20 + [0.8]
    assert judged("gradient", grad_norm=spike, accuracy=[0.5] * 21).state == "watch"
    assert judged("gradient", grad_norm=spike, accuracy=[0.5] * 20 + [0.1]).state == "alarm"
    assert judged("gradient", grad_norm=[0.1] * 20 + [9.0], accuracy=[0.5] * 21).state == "alarm"


def test_a_gradient_that_is_gone_is_an_alarm_unless_the_task_is_solved():
    gone = [0.1] * 20 + [0.0]
    assert judged("gradient", grad_norm=gone, accuracy=[0.3] * 21).state == "alarm"
    assert judged("gradient", grad_norm=gone, accuracy=[0.99] * 21).state == "watch"


def test_a_warm_start_with_a_large_gradient_is_no_spike():
    assert (
        judged("gradient", grad_norm=[1.3, 0.36, 0.35, 0.1, 0.09, 0.09, 0.08, 0.09], accuracy=[0.9] * 8).state == "ok"
    )


def test_steps_without_a_prompt_to_learn_from_make_no_usual_gradient():
    """Kind: a yardstick of fewer groups than a mean needs. A healthy run of one prompt a step with a KL term began with
    three prompts that no answer solved: the gradients that followed were 110 times their median."""
    norms = [1e-4, 2e-4, 0.0265, 1.41, 1.51, 5.11, 3.55, 2.83, 2.5, 1.77, 0.95]
    rest = {"accuracy": [0.5] * 11, "groups": [1.0] * 11}
    for steps in range(1, 12):
        assert judged("gradient", grad_norm=norms[:steps], **{k: v[:steps] for k, v in rest.items()}).state == "ok"
    assert judged("gradient", grad_norm=[*norms, 200.0], accuracy=[0.5] * 12, groups=[1.0] * 12).state == "alarm"
    assert judged("gradient", grad_norm=norms[:8], accuracy=[0.5] * 8, groups=[8.0] * 8).state == "alarm"


def test_a_sampler_of_another_precision_is_seen_by_kl_or_by_probabilities():
    assert judged("mismatch", mismatch_kl=[0.05]).state == "alarm"
    assert judged("mismatch", mismatch_probability=[0.1]).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.003], mismatch_probability=[0.003]).state == "ok"


def test_one_noisy_step_neither_makes_nor_hides_a_mismatch():
    assert judged("mismatch", mismatch_kl=[0.012, 0.014, 0.003]).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.001, 0.09, 0.001]).state == "ok"


def test_phases_that_round_differently_are_an_alarm_however_small_the_divergence():
    assert judged("mismatch", mismatch_kl=[0.001] * 3, mismatch_phases=[0.0007] * 3).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.001] * 3, mismatch_phases=[0.0] * 3).state == "ok"


def test_what_is_not_described_is_an_alarm_that_names_no_cause():
    """Kind: a cause that nobody isolated is named. A factor over the whole batch was 'low-precision arithmetic'."""
    verdict = judged("mismatch", mismatch_kl=[0.05] * 5, mismatch_phases=[0.0] * 5, described_kl=[0.0] * 5)
    assert verdict.state == "alarm"
    assert verdict.evidence == (
        "KL(rollout || train) 0.05 nats a token, 0 of it as described, 0 by decoding token by token; "
        "the rest is not explained"
    )
    foreign = judged("mismatch", mismatch_kl=[0.05] * 5)
    assert (foreign.state, "does not tell why" in foreign.evidence) == ("alarm", True)


def test_a_mismatch_that_decoding_was_measured_to_make_is_a_watch_that_says_so():
    """Fused attention in 16 bits under 4-bit inputs makes up to .011 nats between decoding and one pass."""
    verdict = judged(
        "mismatch",
        mismatch_kl=[0.011] * 5,
        mismatch_phases=[0.0] * 5,
        described_kl=[0.0] * 5,
        decoding_kl=[0.01] * 5,
    )
    assert (verdict.state, "made by decoding" in verdict.evidence) == ("watch", True)


@pytest.mark.parametrize("kl", [0.008, 0.037, 0.15])
def test_a_mismatch_as_large_as_what_is_described_makes_is_no_illness(kl):
    """Kind: whole legitimate classes alarm. AQN without a mode, hardware errors and stochastic formats are measured."""
    described = {"described_kl": [None, None, kl / 2, kl, *[None] * 6], "described_probability": [0.02, *[None] * 9]}
    seen = {"mismatch_kl": [1e-6] * 2 + [kl] * 8, "mismatch_probability": [0.02] * 10}
    assert judged("mismatch", **seen, **described).state == "ok"
    assert judged("mismatch", **seen | {"mismatch_kl": [10 * kl + 0.01] * 10}, **described).state == "alarm"


def test_the_largest_of_the_last_measurements_says_what_noise_makes():
    """Kind: an estimate carried by few tokens is taken for the whole. A healthy W4A4 with AQN: .00105, then .00013."""
    described = {"described_kl": [0.0, 0.0, 0.0, 0.00105, 0.00013, *[None] * 3]}
    described |= {"described_probability": [0.0, 0.0, 0.0, 0.00697, 0.00276, *[None] * 3]}
    met = [0.0, 0.0, 0.0, 0.0332, 0.0133, 0.0169, 0.0145, 0.0145]
    assert judged("mismatch", **described, mismatch_kl=met).state == "ok"  # below .006 + 9 * .00105
    assert judged("mismatch", **described, mismatch_kl=[*met[:5], 0.0169, 0.0169, 0.0169]).state == "alarm"


def test_noise_that_makes_another_policy_of_the_sampler_is_an_alarm_and_hides_no_difference_in_rounding():
    """AQN at 1e-2 on norms under W4A4 shows .037 nats in runs that learn well; 0.05 on linear weights 1.75."""
    assert judged("mismatch", mismatch_kl=[1.75] * 8, described_kl=[1.8] * 8).state == "alarm"
    hidden = judged("mismatch", mismatch_kl=[0.037] * 8, described_kl=[0.04] * 8, mismatch_phases=[0.01] * 8)
    assert (hidden.state, "round differently" in hidden.evidence) == ("alarm", True)


def test_importance_weights_make_up_for_another_sampler_while_most_answers_keep_their_say():
    """Kind: what the recipe does about it is left out. Quantized rollouts under TIS are a recipe, not an illness."""
    apart = {"mismatch_kl": [0.05] * 5, "mismatch_phases": [0.03] * 5}
    assert judged("mismatch", **apart, effective=[0.97] * 5).state == "watch"
    assert judged("mismatch", mismatch_kl=[0.05] * 5, effective=[0.97] * 5).state == "watch"
    assert judged("mismatch", **apart, effective=[0.2] * 5).state == "alarm"


def test_spread_that_goes_all_of_a_sudden_is_an_alarm_unless_the_task_is_solved():
    gone = [0.5] * 10 + [0.94, 0.9, 0.94]
    assert judged_of_16(no_spread=gone, accuracy=[0.7] * 13).state == "alarm"
    assert judged_of_16(no_spread=gone, accuracy=[0.97] * 13).state == "ok"
    slowly = [0.5 + 0.01 * step for step in range(44)]
    assert judged_of_16(no_spread=slowly, accuracy=[0.7] * 44).state == "ok"
    assert judged_of_16(no_spread=[0.85] * 10 + [0.94] * 3, accuracy=[0.2] * 13).state == "ok"


def test_empty_and_repeated_answers_are_dead():
    assert judged("dead_rollouts", empty=[0.9]).state == "alarm"
    assert judged("dead_rollouts", length=[20.0] * 8 + [1.0]).state == "alarm"
    assert judged("dead_rollouts", length=[1.0] * 9).state == "ok"
    assert judged("dead_rollouts", repetition=[0.1] * 8 + [0.9]).state == "alarm"


# -- few answers, few lines, rewards that are no shares


def of_few(seed, level, steps, prompts=1, answers=8):
    """Shares of right answers, prompt by prompt: each prompt has a difficulty of its own (correlation one half)."""
    random = Random(seed)
    rows = []
    for step in range(steps):
        p = min(max(level(step), 1e-6), 1 - 1e-6)
        chances = [random.betavariate(p, 1 - p) for _ in range(prompts)]
        right = [sum(random.random() < chance for _ in range(answers)) for chance in chances]
        rows.append((sum(right) / (prompts * answers), sum(r in (0, answers) for r in right) / prompts))
    return rows


def monitored(rows, every=1, names=("accuracy/rollout", "frac_reward_zero_std"), **more):
    """The monitor after `rows`, logged every so many steps, each line the mean since the last."""
    monitor = Monitor()
    for last in range(every, len(rows) + 1, every):
        means = [sum(column) / every for column in zip(*rows[last - every : last], strict=True)]
        monitor.observe(last, dict(zip(names, means, strict=True)) | more)
    return monitor


@pytest.mark.parametrize(("prompts", "answers"), [(1, 4), (1, 8), (4, 2)])
def test_few_answers_a_step_go_up_and_down_without_an_alarm(prompts, answers):
    """Kind: 'best' climbs on luck. The trend of all of these is flat or rising; 8 answers a step swing from 0 to 1."""
    for seed in range(6):
        rows = of_few(seed, lambda step: 0.4 + 0.0005 * step, 200, prompts, answers)
        assert monitored(rows).alarms == []


def test_few_answers_that_are_all_wrong_in_the_end_are_an_alarm():
    found = [monitored(of_few(seed, lambda step: 0.6 if step < 60 else 0.0, 90)).alarms for seed in range(4)]
    assert [{alarm.check for alarm in alarms} for alarms in found] == [{"accuracy_collapse"}] * 4
    assert all(60 < alarms[0].step <= 85 for alarms in found)


def test_a_log_with_a_line_every_ten_steps_is_judged_in_steps():
    """Kind: lines are counted as if they were steps. Three bad lines would be thirty steps; two are enough here."""
    monitor = monitored(of_few(0, lambda step: 0.6 if step < 200 else 0.01, 260, 16, 8), every=10)
    (alarm,) = (a for a in monitor.alarms if a.check == "accuracy_collapse")
    assert (alarm.step, alarm.since) == (220, 210)


def test_the_number_of_cases_is_read_off_shares():
    """By hand: eighths come from 8 answers, 0 and 1 alone from one group, quarters and thirds together from 12."""
    assert grain([0, 0.125, 0.5, 0.875, 0.25, 1, 0.375, 0.625]) == 8
    assert grain([0, 1, 1, 0, 0, 1, 0, 0]) == 1
    assert grain([0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1 / 12, 0, 1]) == 12
    assert grain([0.5] * 20) is grain([0.5, 0.1] * 10) is grain([-1.0, 0.5, 1, 1, 1, 1, 1, 1]) is None
    assert grain([0.3141, 0.2718, 0.1414, 0.5772, 0.6931, 0.1618, 0.4142, 0.7321]) is None


@pytest.mark.parametrize("level", [-0.5, 0.0, 5.0])
def test_a_reward_that_crosses_zero_has_no_share_to_lose(level):
    """Kind: a ratio to a value that may be 0. A mean near 0 halves and doubles by chance."""
    random = Random(0)
    for _ in range(4):
        rewards = [level - 5.0 + random.gauss(0, 0.3) for _ in range(200)]
        assert monitored([(r,) for r in rewards], names=("reward",)).alarms == []


def test_a_reward_below_zero_that_loses_all_that_it_gained_is_an_alarm():
    random = Random(1)
    course = [-1 + min(step / 50, 1.2) - (1.5 if step >= 80 else 0) + random.gauss(0, 0.1) for step in range(95)]
    monitor = monitored([(r,) for r in course], names=("reward",))
    assert [(a.check, a.step) for a in monitor.alarms] == [("accuracy_collapse", 83)]


# -- states that stay


def test_a_watch_that_stays_and_gets_worse_becomes_an_alarm():
    """Kind: a state that is bad but below a bare limit is said once and forgotten."""

    def lengthening(worse):
        rows = [(20.0, 0.0)] * 30 + [(32.0 + worse * step, 0.25) for step in range(60)]
        return monitored(rows, names=("response_length/mean", "response_length/clip_ratio"))

    worse, steady = lengthening(0.5), lengthening(0.0)
    assert [(a.check, a.since >= 31 + 20) for a in worse.alarms] == [("length_explosion", True)]
    assert "so since step 31, and worse" in worse.alarms[0].evidence
    assert worse.alarms[0].step <= 31 + 25
    assert (steady.alarms, steady.state) == ([], "watch")


def test_more_than_a_third_cut_off_is_an_alarm_unless_it_always_was():
    """A real log: .4 -> 49 % cut off, 2.6x as long, reward flat."""
    rising = [0.004] * 30 + [min(0.49, 0.01 * step) for step in range(80)]
    lengths = [300.0] * 30 + [300 * (1 + min(1.6, 0.02 * step)) for step in range(80)]
    names = ("response_length/clip_ratio", "response_length/mean", "reward")
    monitor = monitored([(cut, length, 0.4) for cut, length in zip(rising, lengths, strict=True)], names=names)
    first = min(alarm.step for alarm in monitor.alarms)
    assert {alarm.check for alarm in monitor.alarms} <= {"length_explosion", "dead_rollouts"}
    assert first <= 30 + 34 + 3  # a third is passed 34 steps after the onset
    always = monitored([(0.4 + 0.001 * step, 300.0, 0.4) for step in range(80)], names=names)
    assert always.alarms == []


def test_a_constant_reward_is_an_alarm_in_every_setting_of_the_filter():
    """Kind: a signal that only one setting logs. Under accuracy filtering half of the groups are kept all the same."""
    for dropped in (0.0, 0.5):
        monitor = Monitor()
        for step in range(1, 6):
            row = {"reward/no_spread": 1.0, "sampling/dropped_share": dropped, "rollout/groups": 16.0}
            monitor.observe(step, row | {"accuracy/rollout": 0.5, "reward/mean": 1.0})
        assert [(a.check, a.step) for a in monitor.alarms] == [("no_spread", 5)]


# -- rules and policies


def test_a_rule_is_read_from_a_sentence():
    rule = Rule.parse("stop if accuracy/rollout < 0.1 at step 20")
    assert (rule.action, rule.metric, rule.op, rule.value, rule.when, rule.step) == (
        "stop", "accuracy/rollout", "<", 0.1, "at", 20,
    )  # fmt: skip
    assert str(rule) == "stop if accuracy/rollout < 0.1 at step 20"
    assert Rule.parse("note if entropy>=2e0").when == "from"


@pytest.mark.parametrize(
    "text", ["", "stop when x < 1", "stop if x < one", "halt if x < 1", "stop if x < 1 at step two"]
)
def test_a_rule_nobody_can_read_is_answered_with_an_example(text):
    with pytest.raises(InvalidValueError, match="write it like 'stop if"):
        Rule.parse(text)


def told(rule, *values, name="x", first=1):
    monitor = Monitor(Health(rules=rule))
    return [
        f for step, v in enumerate(values, start=first) for f in monitor.observe(step, {} if v is None else {name: v})
    ]


def test_an_at_rule_asks_once_and_a_from_rule_at_every_step():
    assert [(f.state, f.step) for f in told("stop if x < 1 at step 3", 0, 0, 2, 0)] == []
    assert [(f.state, f.step) for f in told("stop if x < 1 at step 3", 2, 2, 0, 2, 2, 2)] == [("alarm", 3)]
    assert [(f.state, f.step) for f in told("stop if x < 1 from step 3", 0, 2, 2, 0)] == [("alarm", 4)]
    assert [(f.state, f.step) for f in told("stop if x < 1", 0)] == [("alarm", 1)]


def test_an_at_rule_waits_for_a_metric_that_is_not_logged_at_that_very_step():
    assert [(f.state, f.step) for f in told("stop if x < 1 at step 2", 0, None, None, 0)] == [("alarm", 4)]


def test_a_rule_reads_signals_too():
    (finding,) = told("stop if length > 30", 40.0, name="response_length/mean")
    assert finding.policy == "stop"


def test_a_rule_about_a_metric_nobody_logs_says_so():
    monitor = Monitor(Health(rules=["stop if entropi > 2"]))
    said = [f for step in range(30) for f in monitor.observe(step, {"entropy": 0.1})]
    assert [f.state for f in said] == ["watch"]
    assert "did you mean 'entropy'" in said[0].evidence


def test_policies_come_by_check_and_the_strongest_counts():
    spec = Health(policy="note", policies={"mismatch": "rollback"})
    assert spec.policy_of("mismatch") == "rollback"
    assert spec.policy_of("no_spread") == "note"
    alarm = Finding("mismatch", "alarm", 3, 1, "", "rollback")
    watch = replace(alarm, state="watch")
    assert action([replace(alarm, policy="stop"), alarm]) == "rollback"
    assert action([watch]) == action([]) == "note"


def test_a_policy_for_a_check_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="did you mean 'mismatch'"):
        Health(policies={"missmatch": "stop"})
