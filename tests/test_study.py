"""mnist.search.study: the study's attributes, the next trial, the winner."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mnist.data import Dataset
from mnist.job.options import Options
from mnist.search import runs, space
from mnist.search import study as studies
from mnist.search.storage import StudyError, open_study


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(f"sqlite:///{tmp_path}/db.sqlite3", "study")


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
    for word in ("network is parallel, there linear", "images a trial is 700", "--study study-2"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_finished_study_from_before_training_forms_is_accepted(
    study: optuna.Study, digits: Dataset
) -> None:
    wanted = studies.fingerprint(digits, "parallel", 600)
    study.set_user_attr("fingerprint", {k: v for k, v in wanted.items() if k != "layers"})
    studies.check_fingerprint(study, wanted, finished=True)
    studies.check_fingerprint(study, wanted | {"layers": "plain"})
    with pytest.raises(StudyError, match="layers is in their training form, there plain"):
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


def test_importance_is_withheld_below_ten_complete_trials(study: optuna.Study) -> None:
    for i in range(9):
        add(study, 0.001 * (i + 1), lr=0.001 * (i + 1))
    assert studies.compute_importance(study) is None
    add(study, 0.05, lr=0.05)
    shares = studies.compute_importance(study)
    assert shares is not None
    assert max(shares, key=lambda name: shares[name]) == "lr"


def test_a_seed_follows_from_the_study_s_seed_and_the_trial_s_number() -> None:
    seeds = {runs.derive_seed(seed, number) for seed in range(20) for number in range(50)}
    assert len(seeds) == 1000
    assert runs.derive_seed(3, 7) == runs.derive_seed(3, 7)


def test_a_quick_study_is_another_one(digits: Dataset) -> None:
    quick = replace(digits, validation=digits.validation.head(50))
    whole = studies.fingerprint(digits, "linear", 600)
    assert studies.fingerprint(quick, "linear", 600) != whole
