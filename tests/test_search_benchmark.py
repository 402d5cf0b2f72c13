"""benchmarks/search.py and replay.py: searches on tables of which the best is known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from optuna.samplers._tpe import _truncnorm
from scipy.special import log_ndtr

from benchmarks import curve_runs, curves, replay, search
from mnist.search import budget, space

FIDELITIES = list(curve_runs.FIDELITIES)
N = 64
LIMITS = replay.Limits(24_000, 32 * 24_000)


def written(folder: Path, informative: bool, finals: int = 0) -> Path:
    """A table of N configurations with 20, 25, … final errors in a random order.

    At each fidelity the order is that of the final errors, or up to that of 12,000 images any
    other. `finals` configurations have final errors of two seeds, in the opposite order.
    """
    random = np.random.default_rng(0)
    final = 20 + 5 * random.permutation(N)
    rows = []
    for i, params in enumerate(curve_runs.configurations(space.DEFAULT, N, 0)):
        guesses = random.integers(100, 1_000, len(FIDELITIES))
        errors = [
            int(final[i] + 1_000 - 10 * k if informative or k > 4 else guesses[k])
            for k in range(len(FIDELITIES) - 1)
        ]
        row = {
            "space": "default",
            "number": i,
            "params": params,
            "errors": [*errors, int(final[i])],
        }
        row["log_loss"] = [None if each > 1_310 else each / 1_000 for each in row["errors"]]
        if i < finals:
            row["finals"] = [{"seed": s, "errors": 900 - int(final[i]) + s} for s in (1, 3)]
        rows.append(row)
    rows.append(rows[0] | {"space": "wide"})
    header = {"fidelities": FIDELITIES, "n": 5_000, "final_samples": 300_000}
    curves.write({"header": header, "rows": rows}, folder / "curves.json")
    return folder / "curves.json"


@pytest.fixture(scope="module")
def informative(tmp_path_factory: pytest.TempPathFactory) -> replay.Table:
    return replay.read(written(tmp_path_factory.mktemp("informative"), True))


@pytest.fixture(scope="module")
def uninformative(tmp_path_factory: pytest.TempPathFactory) -> replay.Table:
    return replay.read(written(tmp_path_factory.mktemp("uninformative"), False))


def outcomes(
    table: replay.Table, replayed: replay.Search, seeds: int = 12, limits: replay.Limits = LIMITS
) -> list[search.Outcome]:
    return [search.outcome(list(replayed(table, limits, i)), table.final) for i in range(seeds)]


def median(found: list[search.Outcome]) -> float:
    return float(np.median([each.needed for each in found]))


def test_tau_is_1_where_few_images_tell_all_and_about_0_where_they_tell_nothing(
    informative: replay.Table, uninformative: replay.Table
) -> None:
    assert len(informative.params) == N
    for k, fidelity in enumerate(FIDELITIES):
        assert search.tau(informative.values["errors"][:, k], informative.final) == 1
        little = search.tau(uninformative.values["errors"][:, k], uninformative.final)
        assert abs(little) < 0.2 if fidelity <= 12_000 else little == 1
    assert math.isnan(search.tau(np.ones(1), np.ones(1)))


def test_halving_needs_fewer_images_where_a_rung_tells_and_fails_where_it_does_not(
    informative: replay.Table, uninformative: replay.Table
) -> None:
    halving = replay.Trials(search.RANDOM, budget.RUNGS)
    whole = replay.Trials(search.RANDOM)
    assert median(outcomes(informative, halving)) < 0.7 * median(outcomes(informative, whole))
    lost = outcomes(uninformative, halving)
    assert np.mean([each.regret for each in lost]) > 2 * np.mean(
        [each.regret for each in outcomes(informative, halving)]
    )


def test_tpe_learns_from_what_it_is_told(tmp_path: Path) -> None:
    table = replay.read(written(tmp_path, True))
    slope = np.argsort(np.argsort([-params["lr"] for params in table.params]))
    table.values["errors"][:] = (20 + 5 * slope)[:, None]  # the highest learning rate is best

    def tried(sampler: Any) -> float:
        """Mean place (0 is best) of the first 10 candidates that TPE does not draw at random."""
        steps = [list(replay.Trials(sampler)(table, LIMITS, seed))[10:20] for seed in range(5)]
        return float(np.mean([slope[step.candidate] for each in steps for step in each]))

    assert tried(search.TPE) < 0.75 * tried(search.RANDOM)


def test_all_a_little_finds_the_best_at_once_where_a_little_tells(
    informative: replay.Table, uninformative: replay.Table
) -> None:
    for metric in replay.METRICS:
        found = outcomes(informative, replay.Rounds(0, 1 / 24, metric))
        assert {each.needed for each in found} == {N * 1_000 + 23_000}
        assert {(each.regret, each.complete) for each in found} == {(0, replay.KEPT)}
    rounds = outcomes(informative, replay.Rounds(16, 1 / 4))
    assert {each.complete for each in rounds} == {4 * replay.KEPT}
    assert {each.needed for each in rounds} <= {
        i * (16 * 6_000 + replay.KEPT * 18_000) + 16 * 6_000 + 18_000 for i in range(4)
    }
    assert np.mean([e.regret for e in outcomes(uninformative, replay.Rounds(0, 1 / 24))]) > 30


def test_the_images_of_all_trials_are_counted_up_to_the_limit(informative: replay.Table) -> None:
    steps = list(replay.Trials(search.RANDOM)(informative, LIMITS, 0))
    assert [step.images for step in steps] == [24_000 * (i + 1) for i in range(32)]
    assert len({step.candidate for step in steps}) == 32
    halved = replay.Trials(search.TPE, (1 / 4,))
    steps = list(halved(informative, LIMITS, 0))
    assert 5 < len(steps) < 32
    assert all((step.images - 24_000 * (i + 1)) % 6_000 == 0 for i, step in enumerate(steps))
    assert steps == list(halved(informative, LIMITS, 0))
    assert steps != list(halved(informative, LIMITS, 1))
    begun = replace(halved, first=True)
    first = next(begun(informative, replay.Limits(24_000, 10**9), 0))
    assert (first.candidate, first.images) == (0, 24_000)
    without_end = replay.Limits(24_000, 10**9)
    every = list(replay.Trials(search.TPE, hyperband=True)(informative, without_end, 0))
    assert every[-1].images < N * 24_000  # it ends where there is no candidate left


def test_rungs_are_the_tables_fidelities(informative: replay.Table) -> None:
    def samples(replayed: replay.Trials) -> list[int]:
        return [FIDELITIES[i] for i in replayed.fidelities(informative, LIMITS)]

    current, former = replay.Trials(search.TPE, (1 / 4,)), replay.Trials(search.TPE, search.FORMER)
    assert (samples(current), samples(former)) == ([6_000, 24_000], [4_000, 12_000, 24_000])
    assert samples(replay.Trials(search.TPE, hyperband=True)) == FIDELITIES[:6]
    default = replay.Trials(search.TPE, budget.RUNGS, first=True)
    assert search.SEARCHES[search.CURRENT] == default


def test_the_nearest_candidate_has_the_same_optimizer(informative: replay.Table) -> None:
    points = informative.points
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    kinds = np.array([params["optimizer"] for params in informative.params])
    same = kinds[:, None] == kinds[None]
    assert distances[same].max() <= math.sqrt(2)
    assert distances[~same].min() > 5
    least, most = ({"batch_size": b, "optimizer": "SGD", "lr": lr} for b, lr in LIMIT_PARAMS)
    assert np.subtract(replay.point(most), replay.point(least)) == pytest.approx([1, 1, 0, 0, 0])


LIMIT_PARAMS = ((32, 1e-5), (256, 1e-1))


def test_the_gaussian_process_runs(informative: replay.Table) -> None:
    limits = replay.Limits(24_000, 11 * 24_000)
    assert len(outcomes(informative, search.SEARCHES["GP"], 1, limits)) == 1


def test_scipys_logarithm_of_the_normal_distribution_is_optunas() -> None:
    x = np.concatenate([np.linspace(-300, -20, 50), np.linspace(-20, 40, 500)])
    optunas = [_truncnorm._log_ndtr_single(each) for each in x]
    np.testing.assert_allclose(log_ndtr(x), optunas, rtol=1e-9, atol=1e-15)


def test_a_search_that_found_nothing_good_is_censored() -> None:
    steps = [replay.Step(10, 0, 5.0), replay.Step(20, 1, 4.0), replay.Step(30, 2, 4.5)]
    final = np.array([30.0, 32.0, 20.0])
    assert search.outcome(steps, final) == search.Outcome(math.inf, 12.0, 3)
    assert search.outcome(steps, np.array([30.0, 21.9, 20.0])).needed == 20
    assert search.outcome(steps, final, 1.5).needed == 10
    assert search.outcome([], final) == search.Outcome(math.inf, 12.0, 0)
    assert search.quartiles([1_000, 3_000, math.inf, math.inf], 9_000, 1_000) == "3 (1 to >9)"
    assert search.chance([1.0, 2.0, 3.0, 4.0], [math.inf] * 4) < 0.02
    assert search.chance([math.inf] * 4, [1.0, 2.0, 3.0, 4.0]) > 0.98
    assert search.chance([math.inf] * 4, [math.inf] * 4) == 1


def test_the_seeds_of_the_final_training_are_the_truth_where_all_have_them(tmp_path: Path) -> None:
    few = replay.read(written(tmp_path, True, finals=8))
    assert (few.final == few.values["errors"][:, -1]).all()
    assert few.with_finals.tolist() == list(range(8))
    assert search.tau(few.final[:8], few.seeds.mean(1)) == pytest.approx(-1)
    every = replay.read(written(tmp_path, True, finals=N))
    assert (every.final == 902 - every.values["errors"][:, -1]).all()


def test_every_search_is_in_the_printed_table(tmp_path: Path) -> None:
    def printed(*more: Any) -> list[str]:
        command = ["--table", str(written(tmp_path, True, finals=8)), *map(str, more)]
        done = CliRunner().invoke(search.main, command)
        assert done.exit_code == 0, done.output
        return done.output.splitlines()

    lines = printed("--seeds", 2, "--gp-seeds", 0, "--trials", 6, "--processes", 1)
    text = "\n".join(lines)
    assert "64 configurations of the default space" in text
    assert "at most 72,000 in a search" in text
    for name in search.SEARCHES:
        assert any(line.startswith(f"{name}  ") for line in lines) != name.startswith("GP"), name
    taus = [line for line in lines if line.startswith("Kendall's tau")]
    assert ["n = 64" in taus[0], "n = 8" in taus[1], len(taus)] == [True, True, 2]
    assert sum(line.split()[:3] == ["1,000", "1.00", "1.00"] for line in lines) == 1
    assert sum(line.split()[:3] == ["1,000", "-1.00", "-1.00"] for line in lines) == 1
