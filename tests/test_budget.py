"""mnist.search.budget: plans by tables of figures, without a machine or a clock."""

from dataclasses import replace

import pytest

from mnist.search import budget
from mnist.search.budget import Workload

MNIST = Workload(
    trials=32, confirmations=8, train=52_500, validation=5_000, subset=2_000, norm_images=1_000
)


@pytest.mark.parametrize("images_per_s", [300, 500, 1_000, 2_000, 3_000])
@pytest.mark.parametrize("surviving", [budget.SURVIVING, 1.0])
def test_a_plan_spends_the_time_it_is_given(images_per_s: float, surviving: float) -> None:
    plan = budget.make_plan(replace(MNIST, surviving=surviving), images_per_s, 10.0)
    search_s = MNIST.trials * plan.trial_s
    assert 10 + search_s + plan.after_search_s == pytest.approx(plan.total_s)
    limit_s = budget.TARGET_S if images_per_s >= 2_000 else budget.LIMIT_S
    if images_per_s >= 1_000:
        assert budget.TARGET_S * 0.99 <= plan.total_s <= limit_s * 1.01
    assert plan.final_s >= 0.99 * budget.MIN_FINAL_SHARE * (limit_s - 10 - plan.release_s)
    assert budget.MIN_TRIAL_SAMPLES <= plan.trial_samples <= budget.MAX_TRIAL_SAMPLES


def test_a_slow_machine_takes_longer_to_train_the_final_model_on_enough_images() -> None:
    totals = [budget.make_plan(MNIST, speed, 10.0).total_s for speed in (3_000, 1_400, 1_000, 800)]
    assert totals[0] == pytest.approx(budget.TARGET_S)
    assert totals == sorted(totals)
    assert totals[0] < totals[2] < totals[3] <= budget.LIMIT_S
    enough = budget.make_plan(MNIST, 1_000, 10.0).final_s * 1_000
    assert 0.7 * budget.ENOUGH_FINAL_SAMPLES < enough < 1.3 * budget.ENOUGH_FINAL_SAMPLES


def test_pictures_have_more_time_where_there_are_many() -> None:
    pictures = replace(MNIST, enough_samples=budget.ENOUGH_PICTURE_SAMPLES)
    plan, digits = (budget.make_plan(work, 1_400, 10.0) for work in (pictures, MNIST))
    assert plan.total_s == pytest.approx(budget.LIMIT_S)
    assert plan.final_s > 1.4 * digits.final_s
    few = budget.make_plan(replace(pictures, train=1_500, validation=150), 1_400, 10.0)
    assert few.total_s < budget.TARGET_S


def test_a_fast_machine_needs_less_time() -> None:
    plan = budget.make_plan(MNIST, 1e6, 10.0)
    assert plan.trial_samples == budget.MAX_TRIAL_SAMPLES
    assert plan.final_s == MNIST.max_final_samples / 1e6
    assert plan.total_s < 70


def test_on_a_slow_machine_trials_and_the_final_model_have_their_least() -> None:
    plan = budget.make_plan(MNIST, 50, 10.0)
    assert plan.trial_samples == budget.MIN_TRIAL_SAMPLES
    remaining_s = budget.LIMIT_S - 10 - plan.release_s
    assert plan.final_s == pytest.approx(budget.MIN_FINAL_SHARE * remaining_s)
    assert plan.total_s > budget.LIMIT_S


@pytest.mark.parametrize("images_per_s", [500, 3_000])
def test_a_thorough_run_has_no_time_limit(images_per_s: float) -> None:
    plan = budget.make_plan(replace(MNIST, thorough=True), images_per_s, budget.START_S)
    assert plan.trial_samples == MNIST.train
    assert plan.final_s * images_per_s == pytest.approx(60 * (MNIST.train + MNIST.validation))
    assert plan.total_s > 3 * budget.TARGET_S


def test_a_search_without_a_pruner_is_planned_longer() -> None:
    with_pruner, without = (
        budget.make_plan(replace(MNIST, surviving=share), 1_000, 10.0, trial_samples=10_000).trial_s
        for share in (budget.SURVIVING, 1.0)
    )
    # All of the 10,000 images instead of 7,000, and the evaluation at the end each time.
    assert without - with_pruner == pytest.approx(3.0 + 0.6 * 0.3 * 6_000 / 1_000)


def test_a_timeout_and_quick_shorten_the_plan() -> None:
    assert budget.make_plan(MNIST, 2_000, 10.0, timeout_s=300).total_s == pytest.approx(300)
    quick = replace(MNIST, trials=3, confirmations=0)
    plan = budget.make_plan(quick, 2_000, 10.0, quick=True)
    assert plan.total_s == pytest.approx(budget.QUICK_S)
    assert budget.QUICK_TRIAL_SAMPLES <= plan.trial_samples < 2 * budget.QUICK_TRIAL_SAMPLES


def test_a_trial_has_the_requested_number_of_images() -> None:
    assert budget.make_plan(MNIST, 1_000, 10.0, trial_samples=1_234).trial_samples == 1_234


def test_confirmations_make_trials_shorter() -> None:
    none = budget.make_plan(replace(MNIST, confirmations=0), 2_000, 10.0)
    many = budget.make_plan(replace(MNIST, confirmations=8), 2_000, 10.0)
    assert none.confirm_s == 0
    assert many.trial_samples < none.trial_samples


def test_the_final_training_gets_the_remaining_time_within_limits() -> None:
    plan = budget.Plan(1_000, 1.0, 200.0, 100.0, release_s=20.0, total_s=500.0)
    for remaining_s, final_s in ((220, 200), (200, 180), (50, 150), (1_000, 220)):
        assert budget.allot_final_s(plan, remaining_s) == pytest.approx(final_s)
    for remaining_s, final_s in ((120, 80), (10, 0), (1_000, 200)):
        assert budget.allot_final_s_until(plan, remaining_s) == pytest.approx(final_s)


@pytest.mark.parametrize(
    ("search_s", "confirm_s", "elapsed_s", "remaining_s"),
    [
        (150, 50, 10, 420),  # as planned
        (100, 50, 10, 390),  # faster: the final training takes at most 1.1 times what was planned
        (180, 50, 10, 420),  # slower: the final training is shorter
        (300, 50, 10, 520),  # but has 0.75 of what was planned
        (0, 0, 220, 210),
    ],
)
def test_the_forecast_includes_the_time_that_remains_for_the_final_training(
    search_s: float, confirm_s: float, elapsed_s: float, remaining_s: float
) -> None:
    plan = budget.Plan(1_000, 5.0, 200.0, 100.0, confirm_s=50.0, release_s=20.0, total_s=430.0)
    assert budget.estimate_remaining_s(plan, search_s, confirm_s, elapsed_s) == pytest.approx(
        remaining_s
    )


def test_rungs_are_within_the_trial() -> None:
    for samples in (1, 10, 20_000):
        assert all(1 <= rung <= samples for rung in budget.rungs(samples))
    assert budget.rungs(20_000) == [int(share * 20_000) for share in budget.RUNGS]


@pytest.mark.parametrize(
    ("trials", "done", "elapsed_s", "remaining_s"),
    [(32, 0, 0, 160), (27, 5, 25, 135), (27, 5, 75, 270), (0, 32, 160, 0), (-1, 33, 160, 0)],
)
def test_the_forecast_of_the_search_follows_the_plan_then_the_trials(
    trials: int, done: int, elapsed_s: float, remaining_s: float
) -> None:
    plan = budget.Plan(1_000, trial_s=5.0, final_s=200.0, images_per_s=100.0)
    assert budget.estimate_search_s(plan, trials, done, elapsed_s) == pytest.approx(remaining_s)


@pytest.mark.parametrize(
    ("share", "elapsed_s", "remaining_s"), [(0, 0, 100), (0.01, 5, 95), (0.5, 80, 80), (1, 150, 0)]
)
def test_the_forecast_of_a_training_follows_the_plan_then_its_speed(
    share: float, elapsed_s: float, remaining_s: float
) -> None:
    assert budget.estimate_training_s(100, share, elapsed_s) == pytest.approx(remaining_s)


def test_the_error_of_forecasts_is_the_largest_after_the_first_quarter() -> None:
    forecasts = [(1.0, 500.0), (30.0, 75.0), (60.0, 38.0), (90.0, 10.0)]
    assert budget.forecast_error(forecasts, 100.0) == pytest.approx(0.05)
    assert budget.forecast_error([(1.0, 500.0)], 100.0) == 0
