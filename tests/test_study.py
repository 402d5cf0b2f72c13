"""mnist.search.study: the study's attributes, the next trial, the winner."""

import contextlib
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from mnist.data import Dataset
from mnist.job.options import Options
from mnist.search import budget, runs, space, summary
from mnist.search import study as studies
from mnist.search.storage import StudyError, open_study


@pytest.fixture
def study() -> optuna.Study:
    return open_study("sqlite:///:memory:", "study")


def add(study: optuna.Study, value: float, state: str = "COMPLETE", **params: Any) -> int:
    study.enqueue_trial(studies.FIRST_PARAMS | params)
    trial = studies.ask(study, 0)
    trial.report(value, 1)
    study.tell(trial, value if state == "COMPLETE" else None, TrialState[state])
    return trial.number


def test_the_published_best_comes_first(study: optuna.Study) -> None:
    assert studies.ask(study, 0).params == studies.FIRST_PARAMS


def test_a_waiting_trial_comes_first_with_its_number_and_parameters(study: optuna.Study) -> None:
    add(study, 0.5)
    left = studies.ask(study, 0)
    studies.ask(study, 0)
    study._storage.set_trial_state_values(left._trial_id, TrialState.WAITING)
    resumed = studies.ask(study, 0)
    assert (resumed.number, resumed.params) == (left.number, left.params)


def test_another_seed_asks_for_other_trials(study: optuna.Study) -> None:
    other = open_study("sqlite:///:memory:", "other")
    params = [
        [studies.ask(s, seed).params for _ in range(2)] for s, seed in ((study, 0), (other, 1))
    ]
    assert params[0][0] == params[1][0]
    assert params[0][1] != params[1][1]


@pytest.mark.parametrize("space", [space.DEFAULT, space.WIDE])
def test_tpe_with_a_known_space_proposes_the_same_as_optuna_s(space: space.Space) -> None:
    def propose(sampler: Any) -> list[dict[str, Any]]:
        study, proposals = optuna.create_study(direction="maximize"), []
        for number in range(20):
            study.sampler = sampler(runs.derive_seed(0, number))
            trial = study.ask(space)
            proposals.append(trial.params)
            study.tell(trial, -abs(trial.params["lr"] - 0.001))
        return proposals

    expected = propose(lambda seed: optuna.samplers.TPESampler(seed=seed))
    assert propose(lambda seed: studies.SAMPLERS["tpe"](seed, space)) == expected


def test_trials_that_cannot_be_compared_are_refused_in_one_line(
    study: optuna.Study, digits: Dataset
) -> None:
    studies.check_fingerprint(study, studies.fingerprint(digits, "linear", 600))
    studies.check_fingerprint(study, studies.fingerprint(digits, "linear", 600))
    with pytest.raises(StudyError) as caught:
        studies.check_fingerprint(study, studies.fingerprint(digits, "parallel", 700))
    network = "network is parallel, in the study linear"
    for word in (network, "images a trial is 700", "--study study-2"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_finished_study_from_before_training_forms_is_accepted(
    study: optuna.Study, digits: Dataset
) -> None:
    wanted = studies.fingerprint(digits, "parallel", 600)
    study.set_user_attr("fingerprint", {k: v for k, v in wanted.items() if k != "layers"})
    studies.check_fingerprint(study, wanted, finished=True)
    studies.check_fingerprint(study, wanted | {"layers": "plain"})
    with pytest.raises(StudyError, match="layers is in their training form, in the study plain"):
        studies.check_fingerprint(study, wanted)


def test_an_unfinished_study_from_before_kinds_of_augmentation_is_refused(
    study: optuna.Study, digits: Dataset
) -> None:
    wanted = studies.fingerprint(replace(digits, recipe="plain"), "parallel", 600)
    study.set_user_attr("fingerprint", {k: v for k, v in wanted.items() if k != "augmentation"})
    studies.check_fingerprint(study, wanted, finished=True)
    with pytest.raises(StudyError, match="augmentation is thing, in the study digit"):
        studies.check_fingerprint(study, wanted)


@pytest.mark.parametrize(
    "storage",
    ["nonsense", "sqlite:////nowhere/at/all/db.sqlite3", "postgresql://127.0.0.1:9/x", "x://y"],
)
def test_a_storage_that_cannot_be_opened_is_named(storage: str) -> None:
    with pytest.raises(StudyError, match="cannot be opened") as caught:
        open_study(storage, "study")
    assert repr(storage) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", ["v2.6.0.a", "v9.0.0.a"])
def test_tables_of_another_optuna_are_named_in_one_line(tmp_path: Path, revision: str) -> None:
    url = f"sqlite:///{tmp_path}/db.sqlite3"
    open_study(url, "study")
    with contextlib.closing(sqlite3.connect(tmp_path / "db.sqlite3")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        database.commit()
    with pytest.raises(StudyError, match="`optuna storage upgrade --storage URL`") as caught:
        open_study(url, "study")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + bytes(range(256)) * 40, b"text", None])
def test_a_file_that_is_no_database_or_cannot_be_written_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "db.sqlite3"
    url = f"sqlite:///{file}"
    if content is None:
        open_study(url, "study")
        url = f"sqlite:///file:{file}?mode=ro&uri=true"
    else:
        file.write_bytes(content)
    with pytest.raises(StudyError, match=r"malformed|not a database|readonly") as caught:
        open_study(url, "other")
    assert "\n" not in str(caught.value)


def test_a_password_is_neither_shown_nor_recorded() -> None:
    storage = "postgresql://me:secret@127.0.0.1:9/x"
    with pytest.raises(StudyError) as caught:
        open_study(storage, "study")
    assert "secret" not in str(caught.value)
    assert "secret" not in str(Options(storage=storage).record())


def test_the_best_trials_are_complete_and_not_excluded(study: optuna.Study) -> None:
    for value, state in ((0.5, "COMPLETE"), (0.9, "PRUNED"), (0.7, "COMPLETE"), (0.7, "COMPLETE")):
        add(study, value, state)
    assert [trial.number for trial in studies.best_trials(study, 2)] == [2, 3]
    studies.exclude_trial(study, 2, "diverged")
    assert [trial.number for trial in studies.best_trials(study, 9)] == [3, 0]


def test_the_baselines_are_the_first_and_the_median_trial_on_fresh_seeds(
    study: optuna.Study,
) -> None:
    assert studies.select_baselines(study) == {}
    for value, state in ((0.5, "PRUNED"), (0.9, "COMPLETE"), (0.7, "COMPLETE"), (0.1, "PRUNED")):
        add(study, value, state)
    add(study, 0.6, "PRUNED")
    numbers = {name: trial.number for name, trial in studies.select_baselines(study).items()}
    assert numbers == {"first": 0, "median": 4}
    assert [trial.number for trial, _ in studies.find_unconfirmed(study, 1)] == [1, 0, 4]
    assert studies.find_unconfirmed(study, 0) == []
    for number, accuracy in ((1, 0.9), (0, 0.5)):
        for seed in range(studies.CONFIRM_SEEDS):
            studies.record_confirmation(study, number, seed, accuracy)
    studies.exclude_trial(study, 4, "diverged on a fresh seed")
    winner = studies.select_winner(study, 1)
    assert winner is not None
    assert winner.number == 1
    assert studies.gain_over_baselines(study, winner.number) == {
        "winner": {"trial": 1, "accuracies": [0.9, 0.9]},
        "first": {"trial": 0, "accuracies": [0.5, 0.5]},
    }


def test_the_winner_has_the_best_mean_on_fresh_seeds(study: optuna.Study) -> None:
    assert studies.select_winner(study, 3) is None
    for value in (0.9, 0.8, 0.7, 0.6):
        add(study, value)

    def confirm(number: int, *values: float) -> None:
        for seed, value in enumerate(values):
            studies.record_confirmation(study, number, seed, value)

    confirm(0, 0.80, 0.80)
    confirm(1, 0.85, 0.79)
    assert studies.select_winner(study, 3) is None  # the third is not confirmed yet
    confirm(2, 0.70, 0.71)
    confirm(3, 0.99, 0.99)  # not among the best three
    winner = studies.select_winner(study, 3)
    assert winner is not None
    assert winner.number == 1
    unconfirmed = studies.select_winner(study, 0)
    assert unconfirmed is not None
    assert unconfirmed.number == 0


def test_without_time_for_confirmations_the_best_trial_wins_until_another_one_is_finished(
    study: optuna.Study,
) -> None:
    add(study, 0.8)
    add(study, 0.9)
    studies.record_confirmation(study, 0, 0, 0.99)
    assert studies.select_winner(study, 2) is None
    studies.skip_confirmations(study)
    winner = studies.select_winner(study, 2)
    assert winner is not None
    assert winner.number == 1
    add(study, 0.7, "FAIL")
    assert studies.select_winner(study, 2) is not None
    add(study, 0.7, "PRUNED")
    assert studies.select_winner(study, 2) is None


def test_importance_is_withheld_below_ten_complete_trials(study: optuna.Study) -> None:
    for i in range(9):
        add(study, 0.001 * (i + 1), lr=0.001 * (i + 1))
    assert summary.compute_importance(study) is None
    add(study, 0.05, lr=0.05)
    shares = summary.compute_importance(study)
    assert shares is not None
    assert max(shares, key=lambda name: shares[name]) == "lr"


@pytest.mark.parametrize("space", [space.DEFAULT, space.read_space("default", ["lr=0.01"])])
@pytest.mark.parametrize("better", [0, 1, 2])
def test_importance_is_withheld_for_trials_that_are_alike(
    better: int, space: space.Space, study: optuna.Study
) -> None:
    for number in range(12):
        study.tell(studies.ask(study, number, space=space), 0.5 + 0.1 * (number < better))
    shares = summary.compute_importance(study)
    if better < 2:  # Optuna would warn and call all hyperparameters equally important
        assert shares is None
    else:
        assert shares is not None
        assert all(math.isfinite(share) for share in shares.values())


def test_a_seed_follows_from_the_study_s_seed_and_the_trial_s_number() -> None:
    seeds = {runs.derive_seed(seed, number) for seed in range(20) for number in range(50)}
    assert len(seeds) == 1000
    assert runs.derive_seed(3, 7) == runs.derive_seed(3, 7)


def test_a_quick_study_is_another_one(digits: Dataset) -> None:
    quick = replace(digits, validation=digits.validation.head(50))
    whole = studies.fingerprint(digits, "linear", 600)
    assert studies.fingerprint(quick, "linear", 600) != whole


def test_a_fingerprint_says_what_trials_share(digits: Dataset) -> None:
    lr = {"lr": FloatDistribution(1e-4, 1e-2, log=True)}
    first = studies.fingerprint(digits, "linear", 600, lr)
    assert first == {
        "data": digits.sha256[:16],
        "split": digits.split_sha256[:16],
        "validation images": len(digits.validation),
        "network": "linear",
        "layers": "in their training form",
        "space": {"lr": str(lr["lr"])},
        "images a trial": 600,
    }
    assert studies.fingerprint(digits, "linear", 600, lr, plain=True)["layers"] == "plain"
    folder = replace(digits, name="folder:pets", classes=("cat", "dog"))
    assert studies.fingerprint(folder, "linear", 600, lr) == first | {"classes": "cat, dog"}
    plain = replace(digits, recipe="plain")
    assert studies.fingerprint(plain, "linear", 600, lr) == first | {"augmentation": "thing"}


def test_a_fingerprint_is_stored_with_a_new_study_only(study: optuna.Study) -> None:
    print_ = {"network": "linear", "layers": "plain"}
    studies.check_fingerprint(study, print_)
    assert study.user_attrs["fingerprint"] == print_
    other = open_study("sqlite:///:memory:", "other")
    other.ask()
    with pytest.raises(StudyError, match="study other was not made by this command"):
        studies.check_fingerprint(other, print_)
    assert "fingerprint" not in other.user_attrs


def test_a_difference_is_described_with_both_values(study: optuna.Study) -> None:
    recorded = {"data": "a", "layers": "plain", "space": {"lr": "1", "momentum": "2", "same": "3"}}
    studies.check_fingerprint(study, recorded)
    wanted = {"data": "b", "layers": "plain", "space": {"lr": "9", "same": "3", "dropout": "4"}}
    with pytest.raises(StudyError) as caught:
        studies.check_fingerprint(study, wanted)
    assert "its images differ" in str(caught.value)
    assert "layers" not in str(caught.value)
    differences = (
        *("lr 9, in the study 1", "dropout 4, in the study None"),
        "momentum None, in the study 2",
    )
    assert f"space is {'; '.join(differences)}" in str(caught.value)
    assert "same" not in str(caught.value)


def test_the_pruner_compares_trials_at_the_rungs(study: optuna.Study) -> None:
    rungs = budget.rungs(9_000)
    study.pruner = studies.PRUNERS["halving"](9_000)
    pruned = {}
    for value in (0.9, 0.8, 0.7, 0.95):
        trial = study.ask()
        trial.report(value, rungs[0] - 1)
        early = trial.should_prune()
        trial.report(value, rungs[0])
        pruned[value] = (early, trial.should_prune())
    assert pruned == {
        0.9: (False, False),
        0.8: (False, True),
        0.7: (False, True),
        0.95: (False, False),
    }
    study.pruner = studies.PRUNERS["none"](9_000)
    trial = study.ask()
    trial.report(0.1, rungs[0])
    assert not trial.should_prune()


def test_the_sampler_draws_at_random_if_asked(study: optuna.Study) -> None:
    fixed = {"lr": FloatDistribution(0.1, 0.1), "momentum": FloatDistribution(0.0, 1.0)}
    draws = [studies.ask(study, 0, "random", space=fixed).params for _ in range(3)]
    assert len({params["momentum"] for params in draws}) == 3
    assert {params["lr"] for params in draws} == {0.1}
    tpe = studies.SAMPLERS["tpe"](0, fixed)
    names = tpe.infer_relative_search_space(study, study.trials[0])
    assert [*names] == ["momentum"]


def test_counts_results_and_reasons_make_the_summary(study: optuna.Study) -> None:
    add(study, 0.1, "FAIL")
    failed = studies.ask(study, 0)
    study._storage.set_trial_user_attr(failed._trial_id, "fail_reason", "nan: the loss is nan")
    study.tell(failed, None, TrialState.FAIL)
    pruned, best = add(study, 0.25, "PRUNED", lr=0.01), add(study, 0.75, lr=0.02)
    add(study, 0.5)
    assert studies.count_finished(study) == 3

    def entry(number: int, state: str, accuracy: float, lr: float) -> dict[str, Any]:
        params = studies.FIRST_PARAMS | {"lr": lr}
        return {"number": number, "state": state, "accuracy": accuracy, "params": params}

    assert summary.summarise(study, best) == {
        "trials": {"complete": 2, "pruned": 1, "fail": 2},
        "best": entry(best, "complete", 0.75, 0.02),
        "first": entry(pruned, "pruned", 0.25, 0.01),
        "importance": None,
        "failures": {"0": "unknown", "1": "nan: the loss is nan"},
    }


def test_a_summary_without_a_finished_trial_has_no_first(study: optuna.Study) -> None:
    add(study, 0.1, "FAIL")
    assert summary.summarise(study, 0)["first"] is None


def test_what_is_stored_for_a_trial_leaves_the_other_trials_as_they_are(
    study: optuna.Study,
) -> None:
    for value in (0.7, 0.6, 0.5):
        add(study, value)
    assert studies.final_samples(study, 0) is None
    studies.store_final_samples(study, 0, 100)
    studies.store_final_samples(study, 1, 200)
    assert [studies.final_samples(study, number) for number in range(3)] == [100, 200, None]
    for number, seed, accuracy in ((0, 0, 0.5), (0, 1, 0.75), (1, 0, 0.25)):
        studies.record_confirmation(study, number, seed, accuracy)
    assert studies.confirmations(study, 0) == [0.5, 0.75]
    assert studies.mean_confirmations(study, 3) == {0: 0.625, 1: 0.25}
    assert studies.mean_confirmations(study, 1) == {0: 0.625}
    assert [(t.number, seeds) for t, seeds in studies.find_unconfirmed(study, 2)] == [(1, [1])]
    for number in (0, 1):
        studies.exclude_trial(study, number, "diverged")
    assert [trial.number for trial in studies.best_trials(study, 3)] == [2]
    assert study.user_attrs["set_aside"] == {"0": "diverged", "1": "diverged"}


def test_the_micro_batch_is_that_of_a_trial_s_last_attempt(study: optuna.Study) -> None:
    add(study, 0.5)
    assert studies.micro_batch(study.trials[0]) is None
    trial = study.ask()
    trial.set_user_attr("again", {"micro_batch": 8, "deaths": 0})
    assert studies.micro_batch(study.trials[1]) == 8


def test_one_of_three_trials_survives_a_rung(study: optuna.Study) -> None:
    study.pruner, rung = studies.PRUNERS["halving"](9_000), budget.rungs(9_000)[0]
    pruned = []
    for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.85):
        trial = study.ask()
        trial.report(value, rung)
        pruned.append(trial.should_prune())
    assert pruned == [False, True, True, True, True, False]  # the last one is second of six


def test_baselines_are_finished_trials(study: optuna.Study) -> None:
    add(study, 0.9, "FAIL")
    studies.ask(study, 0).report(0.8, 1)  # it still runs
    assert studies.select_baselines(study) == {}
    number = add(study, 0.5, "PRUNED")
    baselines = studies.select_baselines(study)
    assert {name: trial.number for name, trial in baselines.items()} == {
        "first": number,
        "median": number,
    }
