"""mnist.search.loop: what it does with the messages of its workers; without processes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from mnist.search import loop
from mnist.search import study as studies
from mnist.search.checkpoints import Checkpoints, NoRoom
from mnist.search.members import Member
from mnist.search.runs import Report, Run, RunResult, StudyConfig
from mnist.training import Progress

SAMPLES = 600


class FakeWorker:
    """A worker that has received `runs`, and `replies` to its reports."""

    def __init__(self) -> None:
        self.busy = False
        self.runs: list[Run] = []
        self.replies: list[bool] = []

    def start(self, run: Run) -> None:
        self.busy = True
        self.runs.append(run)

    def reply(self, stop: bool) -> None:
        self.replies.append(stop)


class FakePool:
    """Workers whose messages are those of `script`, one for each call of receive_messages()."""

    def __init__(self, n: int = 1, script: Any = ()) -> None:
        self.workers = [FakeWorker() for _ in range(n)]
        self.script = iter(script)
        self.discarded: list[FakeWorker] = []

    def idle_workers(self) -> list[FakeWorker]:
        return [worker for worker in self.workers if not worker.busy]

    def receive_messages(self, timeout: float) -> Iterator[tuple[FakeWorker, Any]]:
        assert timeout == loop.WAIT_S
        for i, message in next(self.script):
            if isinstance(message, RunResult):
                self.workers[i].busy = False
            yield self.workers[i], message

    def discard(self, worker: FakeWorker) -> None:
        self.discarded.append(worker)


def report(samples: int, accuracy: float | None = None) -> Report:
    errors = None if accuracy is None else round(100 * (1 - accuracy))
    return Report(Progress(samples, SAMPLES, 0.5, errors, None if accuracy is None else 100))


def make_run(folder: Path, **changes: Any) -> Run:
    checkpoint = folder / "run.pt"
    checkpoint.touch()
    return Run("linear", {"batch_size": 32}, SAMPLES, 0, checkpoint=checkpoint, **changes)


# --- runs outside trials


def execute(pool: FakePool, runs: dict[Any, Run]) -> list[Any]:
    return list(loop.execute_runs(pool, runs))  # type: ignore[arg-type]


def test_more_runs_than_workers_are_executed_in_their_order(tmp_path: Path) -> None:
    runs = {key: make_run(tmp_path, rungs=(i,)) for i, key in enumerate("abc")}
    results = [RunResult(accuracy=i / 4) for i in range(3)]
    pool = FakePool(2, [[(1, results[1])], [(0, results[0])], [(1, results[2])]])
    messages = execute(pool, runs)
    none = (None, None)
    assert messages == [("b", results[1]), none, ("a", results[0]), none, ("c", results[2])]
    assert [worker.runs for worker in pool.workers] == [[runs["a"]], [runs["b"], runs["c"]]]


def test_reports_of_runs_outside_trials_never_stop_them(tmp_path: Path) -> None:
    result = RunResult(accuracy=0.5)
    script = [[(0, report(10)), (0, report(20, 0.1))], [], [(0, result)]]
    pool = FakePool(1, script)
    none = (None, None)
    messages = [*(("a", message) for _, message in script[0]), none, none, ("a", result)]
    assert execute(pool, {"a": make_run(tmp_path)}) == messages
    assert pool.workers[0].replies == [False]  # to the one with an accuracy, which waits for it


@pytest.mark.parametrize("failure", [None, "nan"])
def test_a_run_that_has_ended_needs_no_checkpoint(tmp_path: Path, failure: str | None) -> None:
    run, result = make_run(tmp_path), RunResult(failure=failure)
    assert execute(FakePool(1, [[(0, result)]]), {"a": run}) == [("a", result)]
    assert run.checkpoint is not None
    assert not run.checkpoint.exists()


def test_a_run_whose_memory_is_not_enough_is_executed_again_after_the_others(
    tmp_path: Path,
) -> None:
    runs = {key: make_run(tmp_path) for key in "ab"}
    done = RunResult(accuracy=0.5)
    pool = FakePool(1, [[(0, RunResult(failure="memory"))], [(0, done)], [(0, done)]])
    assert [key for key, _ in execute(pool, runs) if key] == ["b", "a"]
    assert [run.micro_batch for run in pool.workers[0].runs] == [None, None, 8]


def test_a_full_disk_ends_runs_outside_trials_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    pool = FakePool(1, [[(0, RunResult(failure="disk", reason="it is full"))]])
    with pytest.raises(NoRoom, match="it is full"):
        execute(pool, {"a": run})
    assert run.checkpoint is not None
    assert run.checkpoint.exists()


def test_a_speed_is_that_of_the_result_whatever_comes_before(tmp_path: Path) -> None:
    pool = FakePool(1, [[(0, report(10))], [], [(0, RunResult(images_per_s=7.0))]])
    assert loop.measure_speed(pool, make_run(tmp_path)) == 7.0  # type: ignore[arg-type]


# --- trials


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=3) as member:
        member.study.pruner = studies.PRUNERS["none"](SAMPLES)
        yield member


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    (tmp_path / "study").mkdir()
    return StudyConfig("linear", 5, SAMPLES, Checkpoints(tmp_path / "study"))


class Clock:
    """In place of the module's `time`: a second passes with each look at it; sleeps are noted."""

    def __init__(self) -> None:
        self.now_s, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        self.now_s += 1
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def run_search(
    member: Member, pool: FakePool, config: StudyConfig, trials: int
) -> list[loop.Update]:
    return list(loop.search(member, pool, config, trials=trials))  # type: ignore[arg-type]


def test_each_message_of_a_trial_is_an_update(
    member: Member, config: StudyConfig, clock: Clock
) -> None:
    reports = [report(100), report(300, 0.25)]
    done = RunResult(accuracy=0.75)
    pool = FakePool(1, [[(0, reports[0])], [(0, reports[1]), (0, done)]])
    updates = run_search(member, pool, config, 1)
    params, none = studies.FIRST_PARAMS, loop.Update()
    assert updates == [
        loop.Update(0, params, reports[0].progress),
        none,
        loop.Update(0, params, reports[1].progress),
        loop.Update(0, params, state=TrialState.COMPLETE, value=0.75, seconds=1.0),
        none,
    ]
    trial = member.study.trials[0]
    assert (trial.value, trial.intermediate_values) == (0.75, {300: 0.25})
    assert "resumed" not in trial.user_attrs
    assert pool.workers[0].runs == [Run.for_trial(config, 0, params, 3)]
    assert pool.discarded == []


def test_a_pruned_trial_is_stopped_and_has_the_value_of_its_last_report(
    member: Member, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member.trials, "report", report_and_prune(member))
    script = [[(0, report(300, 0.25)), (0, report(SAMPLES, 0.5))]]
    script += [[(0, RunResult(accuracy=0.5, stopped=True))]]
    pool = FakePool(1, script)
    last = run_search(member, pool, config, 1)[-2]
    assert pool.workers[0].replies == [True, False]  # at its end there is nothing to stop
    assert (last.state, last.value) == (TrialState.PRUNED, 0.5)


def report_and_prune(member: Member) -> Any:
    real = member.trials.report

    def report(*arguments: Any) -> bool:
        real(*arguments)
        return True

    return report


@pytest.mark.parametrize("exists", [True, False])
def test_a_trial_that_begins_with_a_checkpoint_is_recorded_as_resumed(
    member: Member, config: StudyConfig, exists: bool
) -> None:
    checkpoint = config.checkpoints.trial(0)
    if exists:
        checkpoint.touch()
    run_search(member, FakePool(1, [[(0, RunResult(accuracy=0.5))]]), config, 1)
    assert member.study.trials[0].user_attrs.get("resumed", False) == exists
    assert not checkpoint.exists()


def test_a_trial_is_retried_as_its_last_attempt_says(member: Member, config: StudyConfig) -> None:
    checkpoint = config.checkpoints.trial(0)
    checkpoint.touch()
    results = [
        RunResult(failure="died"),
        RunResult(failure="memory"),
        RunResult(failure="memory", reason="8 are too many"),
        RunResult(accuracy=0.5),  # of the next trial
    ]
    pool = FakePool(1, [[(0, result)] for result in results])
    states = [update.state.name for update in run_search(member, pool, config, 1) if update.state]
    assert states == ["WAITING", "WAITING", "FAIL", "COMPLETE"]
    attempts = [(run.deaths, run.micro_batch) for run in pool.workers[0].runs]
    assert attempts == [(0, None), (1, None), (1, 8), (0, None)]
    assert pool.workers[0].runs[1].mark != 0
    reason = member.study.trials[0].user_attrs["fail_reason"]
    assert reason == "memory: 8 are too many"
    assert not checkpoint.exists()


def test_a_command_waits_for_the_trials_of_other_members(
    member: Member, config: StudyConfig, clock: Clock, tmp_path: Path
) -> None:
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=1) as other:
        claim = other.trials.ask(1, 0)
        assert claim is not None
        pool = FakePool()
        updates = loop.search(member, pool, config, trials=1)  # type: ignore[arg-type]
        assert [next(updates), next(updates)] == [loop.Update()] * 2
        assert clock.slept == [loop.WAIT_S]
        other.trials.tell(claim, TrialState.COMPLETE, 0.5)
        assert list(updates) == []
        assert pool.workers[0].runs == []


def test_a_member_that_waits_finds_the_trials_of_a_dead_one(
    member: Member,
    config: StudyConfig,
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Member(f"sqlite:///{tmp_path}/db.sqlite3", "study", threads=1) as other:
        other.trials.ask(1, 0)
        pool = FakePool(1, [[(0, RunResult(accuracy=0.5))]])
        monkeypatch.setattr(clock, "sleep", lambda _: other.liveness.file_lock.release())
        updates = run_search(member, pool, config, 1)
        other.liveness.file_lock.acquire()
    assert [update.state for update in updates] == [None, TrialState.COMPLETE, None]


def test_the_worker_of_a_trial_that_another_member_has_is_discarded(
    member: Member, config: StudyConfig
) -> None:
    def lose_claim() -> Iterator[list[Any]]:
        taken = {"by": "another", "threads": 1}
        member.study._storage.set_trial_user_attr(claimed()[0], "run", taken)
        yield [(0, report(300, 0.5))]

    def claimed() -> list[int]:
        return [trial._trial_id for trial in member.study.trials]

    pool = FakePool(2, lose_claim())
    updates = loop.search(member, pool, config, trials=2)  # type: ignore[arg-type]
    assert next(updates) == loop.Update()
    assert pool.discarded == [pool.workers[0]]
    updates.close()
    assert pool.discarded == pool.workers  # the second one still had its trial


def test_five_failed_trials_in_a_row_end_the_search_with_the_last_reason(
    member: Member, config: StudyConfig
) -> None:
    failures = [[(0, RunResult(failure="nan", reason=f"reason {i}"))] for i in range(5)]
    with pytest.raises(loop.SearchFailed, match="5 trials in a row failed, the last for reason 4;"):
        run_search(member, FakePool(1, failures), config, 9)
    assert len(member.study.trials) == 5


def test_a_trial_whose_worker_cannot_write_waits_and_keeps_its_checkpoint(
    member: Member, config: StudyConfig
) -> None:
    config.checkpoints.trial(0).touch()
    pool = FakePool(1, [[(0, RunResult(failure="disk", reason="it is full"))]])
    with pytest.raises(NoRoom, match="it is full"):
        run_search(member, pool, config, 1)
    assert member.study.trials[0].state == TrialState.WAITING
    assert config.checkpoints.trial(0).exists()


# --- confirmations


def add_trials(member: Member, *values: float) -> None:
    for value in values:
        claim = member.trials.ask(99, 0)
        assert claim is not None
        member.trials.report(claim, SAMPLES, value)
        member.trials.tell(claim, TrialState.COMPLETE, value)


def test_confirmations_train_as_the_trial_did_on_fresh_seeds(
    member: Member, config: StudyConfig
) -> None:
    add_trials(member, 0.9)
    pool = FakePool(1, [[(0, RunResult(accuracy=value))] for value in (0.5, 0.75)])
    counts = list(loop.confirm(member, pool, config, 1))  # type: ignore[arg-type]
    assert counts == [(1, 2), (2, 2)]
    params = member.study.trials[0].params
    trial = Run.for_trial(config, 0, params, threads=1)
    seeds = set()
    for run in pool.workers[0].runs:
        seeds.add(run.seed)
        # In one cycle of the learning rate, as the final training: no rung compares it.
        same = {"seed": trial.seed, "checkpoint": trial.checkpoint, "threads": 1}
        assert replace(run, rungs=trial.rungs, **same) == trial
    assert len(seeds - {trial.seed}) == 2
    assert studies.confirmations(member.study, 0) == [0.5, 0.75]


def test_a_trial_that_fails_on_a_fresh_seed_is_excluded_and_the_next_best_confirmed(
    member: Member, config: StudyConfig
) -> None:
    add_trials(member, 0.6, 0.9, 0.7)
    bad = RunResult(failure="nan", reason="the loss is nan")
    good = RunResult(accuracy=0.5)
    pool = FakePool(1, [[(0, bad)], *[[(0, good)]] * 20])
    counts = list(loop.confirm(member, pool, config, 1))  # type: ignore[arg-type]
    assert member.study.user_attrs["set_aside"] == {"1": "nan: the loss is nan"}
    winner = studies.select_winner(member.study, 1)
    assert winner is not None
    assert winner.number == 2
    assert counts[-1][0] == counts[-1][1]


def test_without_trials_to_confirm_nothing_runs(member: Member, config: StudyConfig) -> None:
    add_trials(member, 0.9)
    assert list(loop.confirm(member, FakePool(), config, 0)) == []  # type: ignore[arg-type]
