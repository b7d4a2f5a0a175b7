"""The parts of the monitor: what it reads, what each check thinks, rules of one's own, and policies."""

from dataclasses import replace
from random import Random

import pytest
from pydantic import ValidationError

from fp4rl.rl.health.course import Course, trend
from fp4rl.rl.health.courses import Courses
from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.monitor import CHECKS as RUNNING
from fp4rl.rl.health.monitor import Monitor, action
from fp4rl.rl.health.signals import NAMES, signals_of
from fp4rl.spec.health import CHECKS, Health, Rule, Thresholds
from fp4rl.spec.mistakes import BadValue


def judged(check, **signals):
    """The verdict of one check after the courses of `signals` (equally long lists; None leaves a step out)."""
    courses = Courses()
    for step, values in enumerate(zip(*signals.values(), strict=True)):
        courses.add(step, {name: v for name, v in zip(signals, values, strict=True) if v is not None})
    return RUNNING[check](courses, Thresholds())


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
    found = Course()
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


def test_best_and_lowest_are_running_medians_and_not_single_values():
    found = course(1, 1, 1, 1, 9, 1, 1, 1, -9, 1)
    assert found.best == found.lowest == 1


def test_values_that_are_not_finite_are_left_out():
    assert course(1.0, float("nan"), float("inf"), 2.0).values == [1.0, 2.0]


def test_a_robust_line_ignores_an_outlier():
    level, slope = trend([0.0, 1.0, 2.0, 30.0, 4.0, 5.0])
    assert slope == pytest.approx(1.0)
    assert level == pytest.approx(5.0)


# -- checks


def test_every_described_check_runs_and_no_other():
    assert set(RUNNING) == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_without_its_data_keeps_still_and_says_that_it_did_not_judge(check):
    monitor = Monitor()
    assert monitor.observe(1, {"time/step_s": 1.0}) == []
    finding = {f.check: f for f in monitor.standing()}[check]
    assert finding.state == "not judged"
    assert finding.evidence.startswith("needs ")
    assert monitor.state == "not judged"


def test_a_check_that_can_do_without_a_metric_is_judged_without_it():
    monitor = Monitor()
    monitor.observe(1, {"reward/mean": 0.5})
    states = {f.check: (f.state, f.evidence) for f in monitor.standing()}
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


def test_low_precision_arithmetic_is_a_watch_where_both_phases_round_alike_unless_it_grows():
    """bfloat16 under W4A4 shows .009 nats although nothing is wrong."""
    alike = {"mismatch_phases": [0.0, 0.0, 0.0] + [None] * 5}
    assert judged("mismatch", mismatch_kl=[0.009] * 8, **alike).state == "watch"
    assert judged("mismatch", mismatch_kl=[0.009] * 5 + [0.2] * 3, **alike).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.009] * 8).state == "alarm"


def test_noise_is_a_watch_until_it_makes_another_policy_of_the_sampler_and_hides_no_difference_in_rounding():
    """AQN at 1e-2 on norms under W4A4 shows .037 nats in runs that learn well; 0.05 on linear weights 1.75."""
    alike = {"mismatch_phases": [0.0] * 8, "sigma": [0.01] * 8}
    assert judged("mismatch", mismatch_kl=[1e-6] * 4 + [0.037] * 4, **alike).state == "watch"
    assert judged("mismatch", mismatch_kl=[1.75] * 8, **alike).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.037] * 8, **alike | {"mismatch_phases": [0.01] * 8}).state == "alarm"
    assert judged("mismatch", mismatch_kl=[0.037] * 8, sigma=[0.01] * 8).state == "alarm"


def test_spread_that_goes_all_of_a_sudden_is_an_alarm_unless_the_task_is_solved():
    gone = [0.5] * 10 + [0.94, 0.9, 0.94]
    assert judged("no_spread", no_spread=gone, accuracy=[0.7] * 13).state == "alarm"
    assert judged("no_spread", no_spread=gone, accuracy=[0.97] * 13).state == "ok"
    slowly = [0.5 + 0.01 * step for step in range(44)]
    assert judged("no_spread", no_spread=slowly, accuracy=[0.7] * 44).state == "ok"
    assert judged("no_spread", no_spread=[0.85] * 10 + [0.94] * 3, accuracy=[0.2] * 13).state == "ok"


def test_empty_and_repeated_answers_are_dead():
    assert judged("dead_rollouts", empty=[0.9]).state == "alarm"
    assert judged("dead_rollouts", length=[20.0] * 8 + [1.0]).state == "alarm"
    assert judged("dead_rollouts", length=[1.0] * 9).state == "ok"
    assert judged("dead_rollouts", repetition=[0.1] * 8 + [0.9]).state == "alarm"


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
    with pytest.raises(BadValue, match="write it like 'stop if"):
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
