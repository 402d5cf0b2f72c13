"""benchmarks/search.py, replay.py, curve_table.py: searches on tables whose best is known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr

from benchmarks import curve_runs, curve_table, curves, replay, search
from mnist.search import budget, space

FIDELITIES = list(curve_runs.FIDELITIES)
N = 64
LIMITS = replay.Limits(24_000, 32 * 24_000)


def write_table(folder: Path, informative: bool, finals: int = 0) -> Path:
    """Write a table of N configurations with 20, 25, … final errors in a random order.

    The errors at each fidelity have the order of the final errors or, if the table is not
    informative, a random order up to 12,000 images. The first `finals` configurations have final
    trainings of two seeds, with errors in the opposite order.
    """
    rng = np.random.default_rng(0)
    final_errors = 20 + 5 * rng.permutation(N)
    rows = []
    for i, params in enumerate(curve_runs.make_configurations(space.DEFAULT, N, 0)):
        random_errors = rng.integers(100, 1_000, len(FIDELITIES))
        errors = [
            int(final_errors[i] + 1_000 - 10 * k if informative or k > 4 else random_errors[k])
            for k in range(len(FIDELITIES) - 1)
        ]
        row = {
            "space": "default",
            "number": i,
            "params": params,
            "errors": [*errors, int(final_errors[i])],
        }
        row["log_loss"] = [None if n > 1_310 else n / 1_000 for n in row["errors"]]
        if i < finals:
            row["finals"] = [{"seed": s, "errors": 900 - int(final_errors[i]) + s} for s in (1, 3)]
        rows.append(row)
    rows.append(rows[0] | {"space": "wide"})
    header = {"fidelities": FIDELITIES, "n": 5_000, "final_samples": 300_000}
    curves.write_table({"header": header, "rows": rows}, folder / "curves.json")
    return folder / "curves.json"


@pytest.fixture(scope="module")
def informative(tmp_path_factory: pytest.TempPathFactory) -> curve_table.Table:
    return curve_table.read_table(write_table(tmp_path_factory.mktemp("informative"), True))


@pytest.fixture(scope="module")
def uninformative(tmp_path_factory: pytest.TempPathFactory) -> curve_table.Table:
    return curve_table.read_table(write_table(tmp_path_factory.mktemp("uninformative"), False))


def replay_seeds(
    table: curve_table.Table,
    searcher: replay.Search,
    seeds: int = 12,
    limits: replay.Limits = LIMITS,
) -> list[search.Outcome]:
    """Replay a search with several seeds; returns the outcome of each."""
    searches = (list(searcher.run(table, limits, seed)) for seed in range(seeds))
    return [search.judge(trials, table.final_errors) for trials in searches]


def median_images(outcomes: list[search.Outcome]) -> float:
    return float(np.median([outcome.images_needed for outcome in outcomes]))


def mean_regret(outcomes: list[search.Outcome]) -> float:
    return float(np.mean([outcome.regret for outcome in outcomes]))


def test_tau_is_1_for_equal_rankings_and_about_0_for_random_ones(
    informative: curve_table.Table, uninformative: curve_table.Table
) -> None:
    assert len(informative.params) == N
    for k, fidelity in enumerate(FIDELITIES):
        final_errors = informative.final_errors
        assert search.compute_tau(informative.values["errors"][:, k], final_errors) == 1
        errors = uninformative.values["errors"][:, k]
        tau = search.compute_tau(errors, uninformative.final_errors)
        assert abs(tau) < 0.2 if fidelity <= 12_000 else tau == 1
    assert math.isnan(search.compute_tau(np.ones(1), np.ones(1)))


def test_halving_needs_fewer_images_where_rungs_are_informative_and_fails_elsewhere(
    informative: curve_table.Table, uninformative: curve_table.Table
) -> None:
    halving = replay.OptunaSearch(search.RANDOM, budget.RUNGS)
    full = replay.OptunaSearch(search.RANDOM)
    halving_outcomes = replay_seeds(informative, halving)
    full_images = median_images(replay_seeds(informative, full))
    assert median_images(halving_outcomes) < 0.7 * full_images
    misled = replay_seeds(uninformative, halving)
    assert mean_regret(misled) > 2 * mean_regret(halving_outcomes)


def test_tpe_learns_from_reported_values(tmp_path: Path) -> None:
    table = curve_table.read_table(write_table(tmp_path, True))
    ranks = np.argsort(np.argsort([-params["lr"] for params in table.params]))
    table.values["errors"][:] = (20 + 5 * ranks)[:, None]  # the highest learning rate is best

    def mean_rank(sampler: Any) -> float:
        """Mean rank (0 is best) of the first 10 candidates that TPE does not draw at random."""
        searcher = replay.OptunaSearch(sampler)
        searches = [list(searcher.run(table, LIMITS, seed))[10:20] for seed in range(5)]
        return float(np.mean([ranks[trial.candidate] for trials in searches for trial in trials]))

    assert mean_rank(search.TPE) < 0.75 * mean_rank(search.RANDOM)


def test_one_round_finds_the_best_at_once_where_rungs_are_informative(
    informative: curve_table.Table, uninformative: curve_table.Table
) -> None:
    for metric in curve_table.METRICS:
        outcomes = replay_seeds(informative, replay.RoundSearch(0, 1 / 24, metric))
        assert {outcome.images_needed for outcome in outcomes} == {N * 1_000 + 23_000}
        assert {outcome.regret for outcome in outcomes} == {0}
        assert {outcome.complete_trials for outcome in outcomes} == {replay.PROMOTED}
    outcomes = replay_seeds(informative, replay.RoundSearch(16, 1 / 4))
    assert {outcome.complete_trials for outcome in outcomes} == {4 * replay.PROMOTED}
    assert {outcome.images_needed for outcome in outcomes} <= {
        i * (16 * 6_000 + replay.PROMOTED * 18_000) + 16 * 6_000 + 18_000 for i in range(4)
    }
    misled = replay_seeds(uninformative, replay.RoundSearch(0, 1 / 24))
    assert mean_regret(misled) > 30


def test_the_images_of_all_trials_are_counted_up_to_the_limit(
    informative: curve_table.Table,
) -> None:
    trials = list(replay.OptunaSearch(search.RANDOM).run(informative, LIMITS, 0))
    assert [trial.images for trial in trials] == [24_000 * (i + 1) for i in range(32)]
    assert len({trial.candidate for trial in trials}) == 32
    halving = replay.OptunaSearch(search.TPE, (1 / 4,))
    trials = list(halving.run(informative, LIMITS, 0))
    assert 5 < len(trials) < 32
    assert all((trial.images - 24_000 * (i + 1)) % 6_000 == 0 for i, trial in enumerate(trials))
    assert trials == list(halving.run(informative, LIMITS, 0))
    assert trials != list(halving.run(informative, LIMITS, 1))
    unlimited = replay.Limits(24_000, 10**9)
    published_first = replace(halving, published_first=True)
    first = next(published_first.run(informative, unlimited, 0))
    assert (first.candidate, first.images) == (0, 24_000)
    hyperband = replay.OptunaSearch(search.TPE, hyperband=True)
    *_, last = hyperband.run(informative, unlimited, 0)
    assert last.images < N * 24_000  # it ends where there is no candidate left


def test_rungs_are_the_tables_fidelities(informative: curve_table.Table) -> None:
    def fidelities(searcher: replay.OptunaSearch) -> list[int]:
        return [FIDELITIES[i] for i in searcher.fidelity_indices(informative, LIMITS)]

    assert fidelities(replay.OptunaSearch(search.TPE, (1 / 4,))) == [6_000, 24_000]
    two_rungs = replay.OptunaSearch(search.TPE, search.FORMER_RUNGS)
    assert fidelities(two_rungs) == [4_000, 12_000, 24_000]
    assert fidelities(replay.OptunaSearch(search.TPE, hyperband=True)) == FIDELITIES[:6]
    default = replay.OptunaSearch(search.TPE, budget.RUNGS, published_first=True)
    assert search.SEARCHES[search.DEFAULT_SEARCH] == default


def test_the_nearest_candidate_has_the_same_optimizer(informative: curve_table.Table) -> None:
    points = informative.points
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    optimizers = np.array([params["optimizer"] for params in informative.params])
    same = optimizers[:, None] == optimizers[None]
    assert distances[same].max() <= math.sqrt(2)
    assert distances[~same].min() > 5
    bounds = ((32, 1e-5), (256, 1e-1))
    low, high = (
        np.array(curve_table.normalise_params({"batch_size": b, "optimizer": "SGD", "lr": lr}))
        for b, lr in bounds
    )
    assert high - low == pytest.approx([1, 1, 0, 0, 0])


def test_the_gaussian_process_runs(informative: curve_table.Table) -> None:
    limits = replay.Limits(24_000, 11 * 24_000)
    assert len(replay_seeds(informative, search.SEARCHES["GP"], 1, limits)) == 1


def test_scipys_logarithm_of_the_normal_distribution_is_optunas() -> None:
    x = np.concatenate([np.linspace(-300, -20, 50), np.linspace(-20, 40, 500)])
    optunas = [_truncnorm._log_ndtr_single(number) for number in x]
    np.testing.assert_allclose(log_ndtr(x), optunas, rtol=1e-9, atol=1e-15)


def test_a_search_without_a_good_choice_is_censored() -> None:
    values = (5.0, 4.0, 4.5)
    trials = [replay.CompleteTrial(10 * i + 10, i, value) for i, value in enumerate(values)]
    final_errors = np.array([30.0, 32.0, 20.0])
    assert search.judge(trials, final_errors) == search.Outcome(math.inf, False, 12.0, 3)
    assert search.judge(trials, np.array([30.0, 21.9, 20.0])).images_needed == 20
    assert search.judge(trials, final_errors, 1.5).images_needed == 10
    assert search.judge([], final_errors) == search.Outcome(math.inf, False, 12.0, 0)
    good_first = np.array([20.0, 32.0, 30.0])  # later it chooses candidate 1
    assert search.judge(trials, good_first) == search.Outcome(10, False, 12.0, 3)
    quartiles = search.format_quartiles([1_000, 3_000, math.inf, math.inf], 9_000, 1_000)
    assert quartiles == "3 (1 to >9)"
    assert search.compute_p_value([1.0, 2.0, 3.0, 4.0], [math.inf] * 4) < 0.02
    assert search.compute_p_value([math.inf] * 4, [1.0, 2.0, 3.0, 4.0]) > 0.98
    assert search.compute_p_value([math.inf] * 4, [math.inf] * 4) == 1


def test_final_trainings_judge_the_choice_where_all_candidates_have_them(tmp_path: Path) -> None:
    some = curve_table.read_table(write_table(tmp_path, True, finals=8))
    assert (some.final_errors == some.values["errors"][:, -1]).all()
    assert some.with_finals.tolist() == list(range(8))
    tau = search.compute_tau(some.final_errors[:8], some.seed_errors.mean(1))
    assert tau == pytest.approx(-1)
    every = curve_table.read_table(write_table(tmp_path, True, finals=N))
    assert (every.final_errors == 902 - every.values["errors"][:, -1]).all()


def test_expected_errors_follow_the_space_and_not_the_chance_of_a_training(tmp_path: Path) -> None:
    table = curve_table.read_table(write_table(tmp_path, True))
    lr = np.log([params["lr"] for params in table.params])
    truth = 40 + 3 * (lr - lr.mean()) ** 2
    counts = np.random.default_rng(0).poisson(truth).astype(float)
    expected = curve_table.smooth_errors(replace(table, final_errors=counts))
    assert np.abs(expected - truth).mean() < 0.6 * np.abs(counts - truth).mean()
    assert truth[expected.argmin()] < 1.1 * truth.min()


def test_every_search_is_in_the_printed_table(tmp_path: Path) -> None:
    options = ["--seeds", "2", "--gp-seeds", "0", "--trials", "6", "--processes", "1"]
    options += ["--table", str(write_table(tmp_path, True, finals=8))]
    result = CliRunner().invoke(search.main, options)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    text = "\n".join(lines)
    assert "64 configurations of the default space" in text
    assert "at most 72,000 in a search" in text
    for name in search.SEARCHES:
        assert any(line.startswith(f"{name}  ") for line in lines) != name.startswith("GP"), name
    taus = [line for line in lines if line.startswith("Kendall's tau")]
    assert ["n = 64" in taus[0], "n = 8" in taus[1], len(taus)] == [True, True, 2]
    assert sum(line.split()[:3] == ["1,000", "1.00", "1.00"] for line in lines) == 1
    assert sum(line.split()[:3] == ["1,000", "-1.00", "-1.00"] for line in lines) == 1
