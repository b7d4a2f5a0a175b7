"""Schedules against tables worked out by hand, and the old faults that made noise vanish without a word."""

import math

import pytest
from pydantic import ValidationError

from fp4rl.noise.schedule import ScheduleProgress, Stage, StageLog, asked_sigma, sigma_at, stages, values_missed
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.noise import Constant, Cosine, EpochAware, Geometric, Linear, Noise

# 0.05 * 0.01^(i/8), i = 0..8, by a pocket calculator.
NINE = (0.05, 0.0281171, 0.0158114, 0.0088914, 0.005, 0.0028117, 0.0015811, 0.00088914, 0.0005)
# (num_stages, total) -> first step of every interval after the silent one: ceil(i * total / K), by hand.
FIRST_STEPS = {
    (10, 29): (3, 6, 9, 12, 15, 18, 21, 24, 27),
    (10, 58): (6, 12, 18, 24, 29, 35, 41, 47, 53),
    (10, 1000): (100, 200, 300, 400, 500, 600, 700, 800, 900),
}


def _expanded(first_steps, values, total):
    table = [0.0] * first_steps[0]
    for start, end, value in zip(first_steps, (*first_steps[1:], total), values, strict=True):
        table += [value] * (end - start)
    return table


@pytest.mark.parametrize("stages_and_total", FIRST_STEPS)
def test_the_geometric_schedule_equals_the_table_worked_out_by_hand(stages_and_total):
    num_stages, total = stages_and_total
    schedule = Geometric(sigma_start=0.05, sigma_end=0.0005, num_stages=num_stages)
    found = [sigma_at(schedule, step, total) for step in range(total)]
    assert found == pytest.approx(_expanded(FIRST_STEPS[stages_and_total], NINE, total), rel=5e-5)


def test_three_stages_over_seven_steps_by_hand():
    schedule = Geometric(sigma_start=0.04, sigma_end=0.01, num_stages=3)
    # 3 * step / 7 = 0, .43, .86 | 1.29, 1.71 | 2.14, 2.57
    assert [sigma_at(schedule, step, 7) for step in range(7)] == pytest.approx([0, 0, 0, 0.04, 0.04, 0.01, 0.01])


def test_the_epoch_aware_schedule_equals_the_table_worked_out_by_hand():
    schedule = EpochAware(sigma_start=0.05, sigma_end=0.0005, epochs=2, stages_per_epoch=5)
    # b_0 = .05, b_1 = .005, b_2 = .0005; inside an epoch of 12 steps two silent ones, then five values of two steps.
    first = (0.0, 0.05, 0.0281171, 0.0158114, 0.0088914, 0.005)
    second = (0.0, 0.005, 0.0028117, 0.0015811, 0.00088914, 0.0005)
    by_hand = [value for value in (*first, *second) for _ in range(2)]
    assert [sigma_at(schedule, step, 24) for step in range(24)] == pytest.approx(by_hand, rel=5e-5)


def test_an_epoch_aware_run_of_29_steps_in_two_epochs_by_hand():
    schedule = EpochAware(sigma_start=0.05, sigma_end=0.0005, epochs=2, stages_per_epoch=5)
    # inside = 2 * step mod 29; slot = 6 * inside // 29. Epoch 0 has steps 0..14 (2*14 = 28), epoch 1 steps 15..28.
    slots = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    values = {
        0: (0.0, 0.05, 0.0281171, 0.0158114, 0.0088914, 0.005),
        1: (0.0, 0.005, 0.0028117, 0.0015811, 0.00088914, 0.0005),
    }
    by_hand = [values[int(step > 14)][slot] for step, slot in enumerate(slots)]
    assert [sigma_at(schedule, step, 29) for step in range(29)] == pytest.approx(by_hand, rel=5e-5)


def test_an_epoch_starts_exactly_where_the_data_starts_again():
    # In floats 3 * (1 / 3) style arithmetic lands just below the boundary for some of these.
    for total in (3, 7, 9, 21, 49, 93, 147):
        schedule = EpochAware(epochs=total, stages_per_epoch=2)
        assert [sigma_at(schedule, step, total) for step in range(total)] == [0.0] * total


def test_the_silent_epoch_fault_step_0_of_1_is_visible_as_values_missed():
    assert sigma_at(EpochAware(), 0, 1) == 0.0
    assert len(values_missed(EpochAware(), 1)) == 5
    assert values_missed(EpochAware(), 6) == ()


def test_a_run_too_short_for_the_fade_names_the_values_it_misses():
    assert values_missed(Geometric(num_stages=10), 10) == ()
    assert values_missed(Geometric(sigma_start=0.04, sigma_end=0.01, num_stages=3), 2) == (0.01,)


def test_two_stages_are_refused_because_the_exponent_would_be_zero_by_zero():
    with pytest.raises(ValidationError, match="use at least 3"):
        Geometric(num_stages=2)


def test_sigma_end_zero_is_refused_with_a_cure():
    with pytest.raises(ValidationError, match="noise: none"):
        Geometric(sigma_end=0.0)
    with pytest.raises(ValidationError, match="noise: none"):
        EpochAware(sigma_end=0.0)


def test_noise_that_grows_is_refused():
    with pytest.raises(ValidationError, match="swap them"):
        Cosine(sigma_start=1e-4, sigma_end=1e-2)


@pytest.mark.parametrize(("step", "total"), [(0, 0), (-1, 10)])
def test_a_run_without_steps_is_refused(step, total):
    with pytest.raises(InvalidValueError, match="count steps from 0"):
        sigma_at(Constant(), step, total)


def test_steps_beyond_the_plan_keep_the_last_value():
    assert sigma_at(Geometric(), 500, 29) == sigma_at(Geometric(), 28, 29)


def test_smooth_schedules_start_and_end_where_they_say():
    for schedule in (Linear(sigma_start=0.04, sigma_end=0.0), Cosine(sigma_start=0.04, sigma_end=0.0)):
        assert sigma_at(schedule, 0, 11) == pytest.approx(0.04)
        assert sigma_at(schedule, 10, 11) == pytest.approx(0.0, abs=1e-12)
        assert sigma_at(schedule, 5, 11) == pytest.approx(0.02)


def test_every_schedule_is_finite_and_not_negative_over_any_run():
    for schedule in (Geometric(), EpochAware(epochs=3), Constant(), Linear(), Cosine()):
        for total in (1, 2, 3, 10, 29):
            assert all(0 <= sigma_at(schedule, s, total) < math.inf for s in range(total))


def test_stages_cover_the_run_once():
    found = stages(Geometric(num_stages=10), 29)
    assert found[0] == Stage(0, 2, 0.0)
    assert [s for stage in found for s in range(stage.first, stage.last + 1)] == list(range(29))


def test_the_sigma_zero_control_asks_for_nothing_at_any_step():
    noise = Noise(control="sigma_zero")
    assert {asked_sigma(noise, step, 29) for step in range(29)} == {0.0}
    assert asked_sigma(Noise(), 3, 29) == 0.05


def _ran(noise, total, data_epochs):
    """Sigma of every step when the data have been gone through `data_epochs(step)` times before it."""
    course, found = ScheduleProgress.of(noise, total), []
    for step in range(total):
        course = course.at(step, data_epochs(step))
        found.append(course.sigma(noise, step))
    return found


def test_when_dynamic_sampling_ends_an_epoch_early_the_next_begins_there():
    # 24 steps in two epochs; the data of the first are used up after 6 steps, so that its second half never runs. The
    # second epoch has the 18 steps that are left: six slots of three.
    noise = Noise(schedule={"kind": "epoch_aware", "epochs": 2})
    first = [0, 0, 0.05, 0.05, 0.0281171, 0.0281171]
    second = [v for v in (0, 0.005, 0.0028117, 0.0015811, 0.00088914, 0.0005) for _ in range(3)]
    found = _ran(noise, 24, lambda step: step / 6)
    assert found == pytest.approx(first + second, rel=5e-5)
    log = StageLog()
    for sigma in found:
        log.note(sigma)
    assert log.missed(noise.schedule, 24) == pytest.approx((0.0158114, 0.0088914), rel=5e-5)


def test_of_three_epochs_the_middle_one_is_expected_to_be_as_long_as_the_first_was():
    # 30 steps in three epochs; data of 4 steps an epoch. Epoch 1 runs from step 4 to 8, epoch 2 from 8 to the end.
    noise = Noise(schedule={"kind": "epoch_aware", "epochs": 3, "stages_per_epoch": 3, "sigma_end": 0.00005})
    found = _ran(noise, 30, lambda step: step / 4)
    assert found[:4] == pytest.approx([0, 0, 0, 0.05])  # slots of 2.5 steps: 0-2 silent, the first value at step 3
    assert found[4:8] == pytest.approx([0, 0.005, 0.005 / 10**0.5, 0.0005])  # four slots of one step
    assert found[8:14] == [0.0] * 6  # 22 steps in four slots of 5.5
    assert found[-1] == pytest.approx(0.00005)


def test_data_that_last_longer_than_planned_delay_nothing():
    for noise in (Noise(), Noise(schedule={"kind": "epoch_aware", "epochs": 2})):
        for epochs in (lambda _: 0.0, lambda step: step / 20):
            assert _ran(noise, 29, epochs) == [asked_sigma(noise, step, 29) for step in range(29)]


def test_data_gone_through_more_often_than_the_schedule_has_epochs_change_nothing_more():
    noise = Noise(schedule={"kind": "epoch_aware", "epochs": 1})
    assert _ran(noise, 24, lambda step: step / 3) == [asked_sigma(noise, step, 24) for step in range(24)]


def test_the_sigma_zero_control_follows_the_data_without_noise():
    noise = Noise(schedule={"kind": "epoch_aware", "epochs": 2}, control="sigma_zero")
    assert set(_ran(noise, 24, lambda step: step / 6)) == {0.0}


def test_a_stage_log_says_which_values_never_ran():
    log = StageLog()
    for step in range(20):
        log.note(sigma_at(Geometric(), step, 29))
    assert log.missed(Geometric(), 29) == pytest.approx((0.0015811, 0.00088914, 0.0005), rel=5e-5)
