"""The search: trials and confirmations, executed by workers."""

import time
from collections.abc import Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from optuna.trial import TrialState

from mnist import training
from mnist.search import checkpoints
from mnist.search import study as studies
from mnist.search.claims import Claim, ClaimLost
from mnist.search.members import Member
from mnist.search.runs import Report, Run, RunResult, StudyConfig
from mnist.search.space import DEFAULT, Space
from mnist.search.workers import Pool, Worker

MAX_FAILURES_IN_A_ROW = 5  # then the search ends
WAIT_S = 1.0

K = TypeVar("K", bound=Hashable)


class RunFailed(RuntimeError):
    """A run outside a trial failed."""


class Unfinished(RuntimeError):
    """The command stopped before its budget was reached; finished trials are kept."""


class SearchFailed(Unfinished):
    """The command cannot finish; the same command would fail for the same reason."""


@dataclass(frozen=True)
class Update:
    """An event of a search: a trial's `progress`, or its end (`state`, `value`).

    `state` is WAITING where a trial's process failed and the trial will be retried. `number` is
    None where this command only waits for other members.
    """

    number: int | None = None
    params: dict[str, Any] | None = None
    progress: training.Progress | None = None
    state: TrialState | None = None
    value: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class RunningTrial:
    """A trial that a worker of this command trains."""

    claim: Claim
    run: Run
    start: float
    resumed: bool = False  # from a checkpoint


def search(
    member: Member,
    pool: Pool,
    config: StudyConfig,
    *,
    trials: int,
    sampler: str = "tpe",
    space: Space = DEFAULT,
) -> Generator[Update]:
    """Run trials until `trials` of the study are finished, by this or other members.

    Yields an Update at least every WAIT_S seconds. Raises SearchFailed after MAX_FAILURES_IN_A_ROW
    failed trials, NoRoom where a worker cannot write. No trial of this member is left RUNNING,
    however the search ends.
    """
    running: dict[Worker, RunningTrial] = {}
    failures = 0
    try:
        while True:
            for worker in pool.idle_workers():
                claim = member.trials.ask(trials, config.seed, sampler, space)
                if claim is None:
                    break
                retry = claim.attrs.get("again", {})
                run = Run.for_trial(config, claim.number, claim.params, claim.threads, **retry)
                resumed = run.checkpoint is not None and run.checkpoint.exists()
                running[worker] = RunningTrial(claim, run, time.monotonic(), resumed)
                worker.start(run)
            if not running:
                if member.run_locked(studies.count_finished) >= trials:
                    return
                yield Update()
                time.sleep(WAIT_S)
                member.poll()
                continue
            for update, reason in process_messages(member, pool, running):
                yield update
                failures = count_failures(failures, update)
                if failures == MAX_FAILURES_IN_A_ROW:
                    raise SearchFailed(
                        f"{MAX_FAILURES_IN_A_ROW} trials in a row failed, the last for {reason}; "
                        "another network, --space or --param may help"
                    )
            yield Update()
    finally:
        for worker in running:
            pool.discard(worker)
        if running:
            member.requeue_all()


def count_failures(failures: int, update: Update) -> int:
    """Failed trials in a row; a trial that is retried counts once its retries have failed."""
    return 0 if update.state in studies.FINISHED else failures + (update.state == TrialState.FAIL)


def process_messages(
    member: Member, pool: Pool, running: dict[Worker, RunningTrial]
) -> Generator[tuple[Update, str]]:
    """Updates from messages within WAIT_S seconds, with the reason of each failure."""
    for worker, message in pool.receive_messages(WAIT_S):
        try:
            update = record_message(member, worker, running[worker], message)
        except ClaimLost:  # another member has the trial now
            pool.discard(worker)
            del running[worker]
            continue
        if update.state:
            del running[worker]
        yield update, message.reason if isinstance(message, RunResult) else ""


def record_message(
    member: Member, worker: Worker, trial: RunningTrial, message: Report | RunResult
) -> Update:
    """Record a worker's message. Raises ClaimLost, and NoRoom for a full disk."""
    claim = trial.claim
    if isinstance(message, Report):
        progress = message.progress
        if progress.accuracy is not None:
            prune = member.trials.report(claim, progress.samples, progress.accuracy)
            worker.reply(stop=prune and progress.samples < progress.total)
        return Update(claim.number, claim.params, progress)
    value = None
    if message.failure is None:
        state = TrialState.PRUNED if message.stopped else TrialState.COMPLETE
        resumed = {"resumed": True} if trial.resumed else {}
        value = member.trials.tell(
            claim, state, None if message.stopped else message.accuracy, **resumed
        )
    elif message.failure == "disk":
        member.trials.requeue(claim)
        raise checkpoints.NoRoom(message.reason)
    elif next_run := trial.run.retry(message):
        state = TrialState.WAITING
        keys = ("micro_batch", "deaths", "mark")
        member.trials.requeue(claim, again={key: getattr(next_run, key) for key in keys})
    else:
        state = TrialState.FAIL
        member.trials.tell(claim, state, fail_reason=f"{message.failure}: {message.reason}")
    if state != TrialState.WAITING and trial.run.checkpoint:
        trial.run.checkpoint.unlink(missing_ok=True)
    seconds = time.monotonic() - trial.start
    return Update(claim.number, claim.params, state=state, value=value, seconds=seconds)


def execute_runs(
    pool: Pool, runs: Mapping[K, Run]
) -> Generator[tuple[K, Report | RunResult] | tuple[None, None]]:
    """Execute runs outside trials, with retries; the last message of each run is a RunResult.

    Yields (None, None) at least every WAIT_S seconds. Raises NoRoom where a worker cannot write.
    """
    queue, running = list(runs.items()), dict[Worker, tuple[K, Run]]()
    while queue or running:
        for worker in pool.idle_workers()[: len(queue)]:
            running[worker] = queue.pop(0)
            worker.start(running[worker][1])
        for worker, message in pool.receive_messages(WAIT_S):
            key, run = running[worker]
            if isinstance(message, Report):
                if message.progress.accuracy is not None:
                    worker.reply(stop=False)
                yield key, message
                continue
            del running[worker]
            if message.failure == "disk":
                raise checkpoints.NoRoom(message.reason)
            if next_run := run.retry(message):
                queue.append((key, next_run))
                continue
            if run.checkpoint:
                run.checkpoint.unlink(missing_ok=True)
            yield key, message
        if running:
            yield None, None


def measure_speed(pool: Pool, run: Run) -> float:
    """Images per second in a run with `measure`. Raises RunFailed."""
    for _, message in execute_runs(pool, {"speed": run}):
        if isinstance(message, RunResult):
            if message.images_per_s is None:
                raise RunFailed(message.reason)
            return message.images_per_s
    raise AssertionError("a run ends with a RunResult")


def confirm(member: Member, pool: Pool, config: StudyConfig, k: int) -> Generator[tuple[int, int]]:
    """Train with the hyperparameters of the k best trials, and of the baselines, on fresh seeds.

    Each result is stored with the study at once. A trial whose run fails is excluded, and the next
    best takes its place. Yields the number of finished runs and of all runs at least every WAIT_S
    seconds.
    """
    while unconfirmed := member.run_locked(lambda study: studies.find_unconfirmed(study, k)):
        runs = {
            (trial.number, i): Run.for_confirmation(
                config, trial.number, trial.params, i, studies.micro_batch(trial)
            )
            for trial, seeds in unconfirmed
            for i in seeds
        }
        total, done = len(runs), 0
        for key, message in execute_runs(pool, runs):
            if key is not None and isinstance(message, RunResult):
                done += 1
                record_confirmation(member, key, message)
            yield done, total


def record_confirmation(member: Member, key: tuple[int, int], result: RunResult) -> None:
    """Store one confirmation, or exclude a trial whose hyperparameters fail on a fresh seed."""
    number, i = key
    if result.failure:
        reason = f"{result.failure}: {result.reason}"
        member.run_locked(lambda study: studies.exclude_trial(study, number, reason))
    else:
        accuracy = result.accuracy
        assert accuracy is not None
        member.run_locked(lambda study: studies.record_confirmation(study, number, i, accuracy))
