"""mnist.budget: plans by tables of figures, without a machine or a clock."""

from dataclasses import replace

import pytest

from mnist import budget
from mnist.budget import Work

MNIST = Work(
    trials=32, confirmations=4, train=52_500, validation=5_000, subset=2_000, norm_images=2_000
)


@pytest.mark.parametrize(
    ("images_per_s", "total_s"),
    [(5_000, budget.TARGET_S), (2_000, budget.TARGET_S), (500, budget.LIMIT_S)],
)
def test_a_slow_machine_takes_longer_up_to_a_limit(images_per_s: float, total_s: float) -> None:
    assert budget.total_s(MNIST, images_per_s) == total_s
    assert budget.TARGET_S < budget.total_s(MNIST, 800) < budget.LIMIT_S


@pytest.mark.parametrize(("images_per_s", "left_s"), [(1_000, 840), (2_000, 450), (3_000, 450)])
def test_a_plan_spends_the_time_it_is_given(images_per_s: float, left_s: float) -> None:
    plan = budget.plan(MNIST, images_per_s, left_s)
    search_s = MNIST.trials * plan.trial_s
    assert search_s + plan.after_search_s == pytest.approx(left_s, rel=0.01)
    assert budget.LEAST_TRIAL < plan.trial_samples <= budget.MOST_TRIAL
    share = (search_s + plan.confirm_s) / (left_s - plan.release_s)
    assert share <= budget.SEARCH_SHARE * 1.01


def test_a_fast_machine_is_done_sooner() -> None:
    plan = budget.plan(MNIST, 1e6, left_s=450)
    assert plan.trial_samples == budget.MOST_TRIAL
    assert plan.final_s == MNIST.most_final / 1e6
    assert MNIST.trials * plan.trial_s + plan.after_search_s < 60


def test_on_a_slow_machine_a_trial_still_shows_something() -> None:
    plan = budget.plan(MNIST, 50, left_s=450)
    assert plan.trial_samples == budget.LEAST_TRIAL
    assert MNIST.trials * plan.trial_s > budget.SEARCH_SHARE * 450
    assert plan.final_s >= (1 - budget.SEARCH_SHARE) * (450 - budget.RELEASE_S)


@pytest.mark.parametrize("images_per_s", [500, 3_000])
def test_a_thorough_run_takes_as_long_as_it_takes(images_per_s: float) -> None:
    work = replace(MNIST, thorough=True)
    total_s = budget.total_s(work, images_per_s)
    plan = budget.plan(work, images_per_s, total_s - budget.START_S)
    assert plan.trial_samples == MNIST.train
    assert plan.final_s * images_per_s == pytest.approx(60 * (MNIST.train + MNIST.validation))
    assert total_s > 4 * budget.TARGET_S
    assert budget.final_s(plan, plan.final_s + plan.release_s) == plan.final_s


def test_what_was_asked_for_is_what_a_trial_sees() -> None:
    assert budget.plan(MNIST, 1_000, 450, trial_samples=1_234).trial_samples == 1_234


def test_confirmations_are_paid_for_by_shorter_trials() -> None:
    none = budget.plan(replace(MNIST, confirmations=0), 2_000, 450)
    many = budget.plan(replace(MNIST, confirmations=6), 2_000, 450)
    assert none.confirm_s == 0
    assert many.trial_samples < none.trial_samples


def test_the_final_training_has_what_is_left_near_to_what_was_planned() -> None:
    plan = budget.Plan(1_000, 1.0, final_s=200.0, images_per_s=100.0, release_s=20.0)
    for left_s, final_s in ((220, 200), (200, 180), (50, 150), (1_000, 220)):
        assert budget.final_s(plan, left_s) == pytest.approx(final_s)
    for left_s, final_s in ((120, 80), (10, 0), (1_000, 200)):
        assert budget.final_s_until(plan, left_s) == pytest.approx(final_s)


def test_rungs_are_within_the_trial() -> None:
    for samples in (1, 10, 20_000):
        assert all(1 <= rung <= samples for rung in budget.rungs(samples))
    assert budget.rungs(20_000) == [int(share * 20_000) for share in budget.RUNGS]


@pytest.mark.parametrize(
    ("todo", "done", "passed_s", "left_s"),
    [(32, 0, 0, 160), (27, 5, 25, 135), (27, 5, 75, 270), (0, 32, 160, 0), (-1, 33, 160, 0)],
)
def test_the_search_that_is_left_goes_by_the_plan_then_by_the_trials(
    todo: int, done: int, passed_s: float, left_s: float
) -> None:
    plan = budget.Plan(1_000, trial_s=5.0, final_s=200.0, images_per_s=100.0)
    assert budget.search_left_s(plan, todo, done, passed_s) == pytest.approx(left_s)


@pytest.mark.parametrize(
    ("share", "passed_s", "left_s"), [(0, 0, 100), (0.01, 5, 95), (0.5, 80, 80), (1, 150, 0)]
)
def test_the_training_that_is_left_goes_by_the_plan_then_by_its_speed(
    share: float, passed_s: float, left_s: float
) -> None:
    assert budget.training_left_s(100, share, passed_s) == pytest.approx(left_s)


def test_a_forecast_is_judged_by_its_worst_moment_after_the_first_quarter() -> None:
    forecasts = [(1.0, 500.0), (30.0, 75.0), (60.0, 38.0), (90.0, 10.0)]
    assert budget.forecast_error(forecasts, 100.0) == pytest.approx(0.05)
    assert budget.forecast_error([(1.0, 500.0)], 100.0) == 0
