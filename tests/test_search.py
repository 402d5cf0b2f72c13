"""mnist.search.loop: the budget, pruning, what a stop or a failure leaves; all by real workers."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from mnist import data
from mnist.search import budget, loop
from mnist.search import study as studies
from mnist.search.checkpoints import Checkpoints
from mnist.search.members import Member
from mnist.search.runs import Run, RunResult, Setup, StudyConfig
from mnist.search.space import DEFAULT
from mnist.search.workers import Pool, Worker

SETUP = Setup(functools.partial(data.load, "digits"), "cpu", threads=1)
SAMPLES = 600
CONFIG = StudyConfig("linear", 0, SAMPLES, Checkpoints(Path("none")))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, SETUP) as pool:
        yield pool


def member(folder: Path, name: str = "study") -> Member:
    member = Member(f"sqlite:///{folder}/db.sqlite3", name, threads=1)
    member.study.pruner = studies.make_pruner(SAMPLES)
    return member


def run_search(member: Member, pool: Pool, trials: int, **options: Any) -> list[loop.Update]:
    with member:
        return list(loop.search(member, pool, CONFIG, trials=trials, **options))


def outcome(member: Member) -> list[tuple[Any, ...]]:
    return [(t.params, t.state, t.value, t.intermediate_values) for t in member.study.trials]


def states(member: Member) -> list[TrialState]:
    return [trial.state for trial in member.study.trials]


def test_a_search_ends_with_exactly_the_trials_asked_for_some_pruned_by_their_reports(
    tmp_path: Path, pool: Pool
) -> None:
    one = member(tmp_path)
    run_search(one, pool, 12)
    assert len(one.study.trials) == studies.count_finished(one.study) == 12
    pruned = [trial for trial in one.study.trials if trial.state == TrialState.PRUNED]
    assert 3 <= len(pruned) <= 11
    for trial in pruned:
        assert trial.last_step in trial.intermediate_values
        assert trial.last_step < SAMPLES
        assert trial.value == trial.intermediate_values[trial.last_step]
    for trial in one.study.trials:
        if trial.state == TrialState.COMPLETE:
            assert len(trial.intermediate_values) == len(budget.RUNGS) + 1


def test_25_trials_and_25_more_equal_50(tmp_path: Path, pool: Pool) -> None:
    whole, parts = member(tmp_path, "whole"), member(tmp_path, "parts")
    run_search(whole, pool, 50)
    run_search(parts, pool, 25)
    run_search(member(tmp_path, "parts"), pool, 50)
    assert len(outcome(whole)) == 50
    assert outcome(parts) == outcome(whole)


def test_a_finished_study_runs_nothing(tmp_path: Path, pool: Pool) -> None:
    run_search(member(tmp_path), pool, 3)
    for trials in (3, 2):
        one = member(tmp_path)
        assert run_search(one, pool, trials) == []
        assert len(one.study.trials) == 3


def test_a_stop_in_mid_trial_changes_nothing(tmp_path: Path, pool: Pool) -> None:
    whole, stopped = member(tmp_path, "whole"), member(tmp_path, "stopped")
    run_search(whole, pool, 4)
    with stopped:
        updates = loop.search(stopped, pool, CONFIG, trials=4)
        next(update for update in updates if update.number == 2 and update.progress)
        updates.close()
        assert states(stopped)[2:] == [TrialState.WAITING]
    run_search(member(tmp_path, "stopped"), pool, 4)
    assert outcome(stopped) == outcome(whole)


def test_a_trial_that_fails_has_its_reason_and_five_in_a_row_end_the_search(
    tmp_path: Path, pool: Pool
) -> None:
    diverging = DEFAULT | {"lr": FloatDistribution(1e38, 1e38)}
    one = member(tmp_path)
    with pytest.raises(loop.Unfinished, match=r"5 trials in a row failed, .* the loss is nan"):
        run_search(one, pool, 10, space=diverging)
    assert states(one) == [TrialState.FAIL] * 5
    assert one.study.trials[0].user_attrs["fail_reason"].startswith("nan: the loss is")


@pytest.mark.parametrize("failure", ["memory", "died"])
def test_failures_that_are_retried_end_the_search_too(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    monkeypatch.setattr(
        Pool,
        "receive_messages",
        lambda self, timeout: [
            (worker, fail_worker(worker, failure)) for worker in self.workers if worker.busy
        ],
    )
    one = member(tmp_path)
    with pytest.raises(loop.Unfinished, match="5 trials in a row failed"):
        run_search(one, pool, 50)
    assert states(one) == [TrialState.FAIL] * 5
    pool.discard(pool.workers[0])


def test_failures_with_a_finished_trial_between_them_do_not_end_the_search(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = 0

    def receive_messages(self: Pool, timeout: float) -> Iterator[tuple[Worker, RunResult]]:
        nonlocal received
        for worker in [worker for worker in self.workers if worker.busy]:
            received += 1
            result = fail_worker(worker, "error")
            yield worker, result if received % 5 else RunResult(accuracy=0.5)

    monkeypatch.setattr(Pool, "receive_messages", receive_messages)
    one = member(tmp_path)
    run_search(one, pool, 2)
    assert states(one) == [*[TrialState.FAIL] * 4, TrialState.COMPLETE] * 2
    pool.discard(pool.workers[0])


@pytest.mark.parametrize(
    ("state", "after_three"),
    [("FAIL", 4), ("COMPLETE", 0), ("PRUNED", 0), ("WAITING", 3), (None, 3)],
)
def test_only_a_finished_trial_ends_a_row_of_failures(state: str | None, after_three: int) -> None:
    update = loop.Update(0, state=TrialState[state] if state else None)
    assert loop.count_failures(3, update) == after_three


def fail_worker(worker: Worker, failure: str) -> RunResult:
    worker.busy = False
    return RunResult(failure=failure, reason="so it is")


def test_a_bug_in_a_network_is_the_trial_s_failure_not_the_search_s(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Run.for_trial

    def make_second_fail(config: StudyConfig, number: int, *arguments: Any) -> Run:
        return real(
            replace(config, network="unknown") if number == 1 else config, number, *arguments
        )

    monkeypatch.setattr(Run, "for_trial", make_second_fail)
    one = member(tmp_path)
    run_search(one, pool, 3)
    assert states(one)[1] == TrialState.FAIL
    assert "error: ValueError: unknown network" in one.study.trials[1].user_attrs["fail_reason"]
    assert studies.count_finished(one.study) == 3


def test_a_worker_that_dies_on_a_trial_is_replaced_and_the_trial_retried(
    tmp_path: Path, pool: Pool
) -> None:
    undisturbed, one = member(tmp_path, "undisturbed"), member(tmp_path, "one")
    run_search(undisturbed, pool, 2)
    states_seen = []
    with one:
        for update in loop.search(one, pool, CONFIG, trials=2):
            states_seen.append(update.state)
            if update.number == 1 and update.progress and TrialState.WAITING not in states_seen:
                pool.workers[0].process.kill()
                pool.workers[0].process.join()
    assert TrialState.WAITING in states_seen
    assert outcome(one) == outcome(undisturbed)


def test_the_speed_of_a_worker_is_measured_and_a_network_that_fails_says_why(pool: Pool) -> None:
    run = Run("linear", {"batch_size": 8, "optimizer": "Adam", "lr": 1e-8}, 0, 0, measure=True)
    assert 1 < loop.measure_speed(pool, run) < 10_000_000
    with pytest.raises(loop.RunFailed, match="unknown network 'nothing'"):
        loop.measure_speed(pool, replace(run, network="nothing"))


def test_a_trial_on_which_three_workers_die_is_given_up(tmp_path: Path, pool: Pool) -> None:
    one = member(tmp_path)
    with one:
        for update in loop.search(one, pool, CONFIG, trials=1):
            if update.number == 0 and update.progress:
                pool.workers[0].process.kill()
                pool.workers[0].process.join()
    assert states(one)[0] == TrialState.FAIL
    reason = one.study.trials[0].user_attrs["fail_reason"]
    assert reason.startswith("died: its process ended by SIGKILL")
    assert studies.count_finished(one.study) == 1


def test_a_full_disk_ends_the_search_and_the_trial_waits(tmp_path: Path, pool: Pool) -> None:
    one = member(tmp_path)
    with one:
        claim = one.trials.ask(5, 0)
        assert claim is not None
        run = Run.for_trial(CONFIG, claim.number, claim.params, claim.threads)
        trial = loop.RunningTrial(claim, run, 0.0)
        full = RunResult(failure="disk", reason="[Errno 28] No space left on device")
        with pytest.raises(OSError, match="No space left"):
            loop.record_message(one, pool.workers[0], trial, full)
    assert states(one) == [TrialState.WAITING]


def test_confirmations_are_kept_as_they_come_in_and_made_once(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, runs, real = member(tmp_path), [], Run.for_confirmation

    def counted(*arguments: Any) -> Run:
        runs.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(Run, "for_confirmation", counted)
    with one:
        list(loop.search(one, pool, CONFIG, trials=4))
        best = [trial.number for trial in studies.best_trials(one.study, 2)]
        compared = {
            *best,
            *(trial.number for trial in studies.select_baselines(one.study).values()),
        }
        for done, _ in loop.confirm(one, pool, CONFIG, 2):
            if done == 1:
                break
        first = studies.select_winner(one.study, 2)
        runs.clear()
        left = 2 * len(compared) - 1
        assert list(loop.confirm(one, pool, CONFIG, 2))[-1] == (left, left)
        assert first is None
        assert len(runs) == left
        assert studies.select_winner(one.study, 2) is not None
        assert all(len(studies.confirmations(one.study, number)) == 2 for number in compared)
    assert len(one.study.trials) == 4
