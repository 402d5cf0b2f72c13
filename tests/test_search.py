"""mnist.search: the study, its budget, its pruning, how it goes on after a stop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from mnist import search, training
from mnist.data import Dataset
from mnist.options import Options


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return search.open_study(f"sqlite:///{tmp_path}/db.sqlite3", "study")


def go(study: optuna.Study, digits: Dataset, trials: int, **settings: Any) -> list[search.Update]:
    settings = {"trial_samples": 600, "seed": 0, "device": torch.device("cpu")} | settings
    return list(search.search(study, digits, "linear", trials=trials, **settings))


def outcome(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [(t.params, t.state, t.value, t.intermediate_values) for t in study.trials]


def states(study: optuna.Study) -> list[TrialState]:
    return [trial.state for trial in study.trials]


def test_a_search_ends_with_exactly_the_trials_asked_for_some_pruned_by_their_reports(
    study: optuna.Study, digits: Dataset
) -> None:
    go(study, digits, 12)
    assert search.finished(study) == 12
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert 3 <= len(pruned) <= 11
    for trial in pruned:
        assert trial.last_step in trial.intermediate_values
        assert trial.last_step < 600
        assert trial.value == trial.intermediate_values[trial.last_step]
    for trial in study.trials:
        if trial.state == TrialState.COMPLETE:
            assert len(trial.intermediate_values) == 3


def test_the_published_best_comes_first(study: optuna.Study, digits: Dataset) -> None:
    go(study, digits, 1)
    assert study.trials[0].params == search.FIRST


def test_a_finished_study_runs_nothing(study: optuna.Study, digits: Dataset) -> None:
    go(study, digits, 3)
    assert go(study, digits, 3) == []
    assert go(study, digits, 2) == []
    assert len(study.trials) == 3


def test_a_study_that_was_continued_equals_one_that_was_not(
    study: optuna.Study, digits: Dataset
) -> None:
    go(study, digits, 8)
    again = search.open_study("sqlite:///:memory:", "again")
    go(again, digits, 3)
    go(again, digits, 8)
    assert outcome(again) == outcome(study)


def test_another_seed_asks_for_other_trials(study: optuna.Study, digits: Dataset) -> None:
    go(study, digits, 2)
    other = search.open_study("sqlite:///:memory:", "other")
    go(other, digits, 2, seed=1)
    assert study.trials[0].params == other.trials[0].params
    assert study.trials[1].params != other.trials[1].params


def test_a_trial_left_running_is_run_again_under_its_number_as_if_never_stopped(
    study: optuna.Study, digits: Dataset
) -> None:
    go(study, digits, 4)
    again = search.open_study("sqlite:///:memory:", "again")
    go(again, digits, 2)
    updates = search.search(
        again,
        digits,
        "linear",
        trials=4,
        trial_samples=600,
        seed=0,
        device=torch.device("cpu"),
    )
    next(update for update in updates if update.progress and update.progress.accuracy)
    updates.close()
    assert states(again)[2:] == [TrialState.WAITING]
    go(again, digits, 4)
    assert outcome(again) == outcome(study)


def test_a_process_that_was_killed_leaves_nothing_running(study: optuna.Study) -> None:
    left = study.ask(search.SPACE)
    search.release(study)
    assert states(study) == [TrialState.WAITING]
    assert study.ask(search.SPACE).params == left.params


def test_an_interrupt_in_mid_trial_keeps_what_finished_and_leaves_nothing_running(
    study: optuna.Study, digits: Dataset
) -> None:
    updates = search.search(
        study,
        digits,
        "linear",
        trials=5,
        trial_samples=600,
        seed=0,
        device=torch.device("cpu"),
    )
    for update in updates:
        if update.number == 2:
            break
    updates.close()
    assert search.finished(study) == 2
    assert TrialState.RUNNING not in states(study)
    go(study, digits, 5)
    assert search.finished(study) == 5


def test_a_trial_that_diverges_is_failed_with_its_reason_and_five_end_the_search(
    study: optuna.Study, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> Any:
        raise training.Diverged("the loss is nan")
        yield

    monkeypatch.setattr(training, "fit", diverge)
    with pytest.raises(search.Unfinished, match=r"5 trials in a row failed, .* the loss is nan"):
        go(study, digits, 10)
    assert states(study) == [TrialState.FAIL] * 5
    assert study.trials[0].user_attrs["fail_reason"] == "the loss is nan"


def test_a_trial_that_runs_out_of_memory_is_failed_and_the_search_goes_on(
    study: optuna.Study, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training.fit, []

    def fit(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe #0")
        yield from real(*args, **kwargs)

    monkeypatch.setattr(training, "fit", fit)
    go(study, digits, 3)
    assert states(study)[1] == TrialState.FAIL
    assert study.trials[1].user_attrs["fail_reason"] == "DefaultCPUAllocator: can't allocate memory"
    assert search.finished(study) == 3


def test_a_deadline_stops_in_mid_trial(study: optuna.Study, digits: Dataset) -> None:
    go(study, digits, 5, deadline=0.0)
    assert search.finished(study) == 0
    assert TrialState.RUNNING not in states(study)


def test_trials_that_cannot_be_compared_are_refused_in_one_line(
    study: optuna.Study, digits: Dataset
) -> None:
    search.agree(study, search.fingerprint(digits, "linear", 600))
    search.agree(study, search.fingerprint(digits, "linear", 600))
    with pytest.raises(search.StudyError) as caught:
        search.agree(study, search.fingerprint(digits, "parallel", 700))
    for word in ("network is parallel, there linear", "images a trial is 700", "--study study-2"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "storage",
    ["nonsense", "sqlite:////nowhere/at/all/db.sqlite3", "postgresql://127.0.0.1:9/x", "x://y"],
)
def test_a_storage_that_cannot_be_opened_is_named(storage: str) -> None:
    with pytest.raises(search.StudyError, match="cannot be opened") as caught:
        search.open_study(storage, "study")
    assert repr(storage) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+pysqlite"])
def test_one_process_at_a_time_works_on_a_study(tmp_path: Path, driver: str) -> None:
    storage = f"sqlite:///{tmp_path}/db.sqlite3"
    same = f"{driver}:///{tmp_path}/../{tmp_path.name}/db.sqlite3"
    busy = pytest.raises(search.StudyError, match="another process is working on study study")
    with search.lock(storage, "study"):
        with busy, search.lock(same, "study"):
            pass
        with search.lock(storage, "other"):
            pass
    with search.lock(same, "study"):
        pass


def test_a_password_is_neither_shown_nor_recorded() -> None:
    storage = "postgresql://me:secret@127.0.0.1:9/x"
    with pytest.raises(search.StudyError) as caught:
        search.open_study(storage, "study")
    assert "secret" not in str(caught.value)
    assert "secret" not in str(Options(storage=storage).record())


def test_the_best_trial_is_the_best_complete_one_that_was_not_set_aside(
    study: optuna.Study,
) -> None:
    for value, state in ((0.5, "COMPLETE"), (0.9, "PRUNED"), (0.7, "COMPLETE"), (0.7, "COMPLETE")):
        trial = study.ask(search.SPACE)
        trial.report(value, 1)
        study.tell(trial, value if state == "COMPLETE" else None, TrialState[state])
    best = search.best_trial(study)
    assert best is not None
    assert best.number == 2
    search.set_aside(study, best, "diverged")
    best = search.best_trial(study)
    assert best is not None
    assert best.number == 3


def test_importance_is_withheld_below_ten_complete_trials(study: optuna.Study) -> None:
    def tell(lr: float) -> None:
        study.enqueue_trial({"batch_size": 64, "optimizer": "Adam", "lr": lr})
        study.tell(study.ask(search.SPACE), lr)

    for i in range(9):
        tell(0.001 * (i + 1))
    assert search.importance(study) is None
    tell(0.05)
    shares = search.importance(study)
    assert shares is not None
    assert max(shares, key=lambda name: shares[name]) == "lr"


def test_a_plan_spends_the_time_it_is_given(digits: Dataset) -> None:
    def planned(speed: float) -> search.Plan:
        return search.plan(digits, 4, speed, total_s=150)

    slow, fast = planned(50), planned(1_000_000)
    assert 4 * slow.trial_s + slow.final_s == pytest.approx(150, rel=0.01)
    assert fast.trial_samples == len(digits.train)
    assert 4 * fast.trial_s + fast.final_s < 1
    assert planned(51).trial_samples > slow.trial_samples


def test_a_seed_follows_from_the_study_s_seed_and_the_trial_s_number() -> None:
    seeds = {search.seed_of(seed, number) for seed in range(20) for number in range(50)}
    assert len(seeds) == 1000
    assert search.seed_of(3, 7) == search.seed_of(3, 7)


def test_a_quick_study_is_another_one(digits: Dataset) -> None:
    quick = replace(digits, validation=digits.validation.head(50))
    whole = search.fingerprint(digits, "linear", 600)
    assert search.fingerprint(quick, "linear", 600) != whole
