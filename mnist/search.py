"""The search: trials and their confirmations, carried out by workers."""

import time
from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from mnist import study as studies
from mnist import training
from mnist.members import Claim, ClaimLost, Member
from mnist.space import DEFAULT, Space
from mnist.workers import Pool, Report, Run, RunResult, Worker

FAILURES = 5  # failed trials in a row that end a search
WAIT_S = 1.0

K = TypeVar("K", bound=Hashable)


class RunFailed(RuntimeError):
    """A run that is no trial, and could not be carried out."""


class Unfinished(RuntimeError):
    """A search that stopped before its budget was reached; what finished is kept."""


@dataclass(frozen=True)
class Update:
    """What happens in a search: a trial goes on (`progress`) or ends (`state`, `value`).

    `state` is WAITING where a trial's process failed and it is to be tried again; `number` is
    None where there is nothing to do here but to wait for other members.
    """

    number: int | None = None
    params: dict[str, Any] | None = None
    progress: training.Progress | None = None
    state: TrialState | None = None
    value: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A trial that a worker of this command trains."""

    claim: Claim
    run: Run
    start: float
    resumed: bool = False  # from a checkpoint


def search(
    member: Member,
    pool: Pool,
    run_of: Callable[[Claim], Run],
    *,
    trials: int,
    seed: int,
    sampler: str = "tpe",
    space: Space = DEFAULT,
) -> Generator[Update]:
    """Go on until `trials` trials of the study are finished, whoever finishes them.

    `run_of` makes a trial's run. Yields what happens, at least every WAIT_S seconds. Raises
    Unfinished after FAILURES failed trials in a row, OSError where a worker cannot write. However
    it ends, no trial of this member is left RUNNING.
    """
    running: dict[Worker, Trial] = {}
    failures = 0
    try:
        while True:
            for worker in pool.idle_workers():
                claim = member.ask(trials, seed, sampler, space)
                if claim is None:
                    break
                run = replace(run_of(claim), **claim.attrs.get("again", {}))
                resumed = run.checkpoint is not None and run.checkpoint.exists()
                running[worker] = Trial(claim, run, time.monotonic(), resumed)
                worker.start(run)
            if not running:
                if member.run_locked(studies.finished) >= trials:
                    return
                yield Update()
                time.sleep(WAIT_S)
                member.poll()
                continue
            for update, reason in listen(member, pool, running):
                yield update
                failures = count(failures, update)
                if failures == FAILURES:
                    raise Unfinished(f"{FAILURES} trials in a row failed, the last for {reason}")
            yield Update()
    finally:
        for worker in running:
            pool.discard(worker)
        if running:
            member.requeue_all()


def count(failures: int, update: Update) -> int:
    """Failed trials in a row; one that is to be tried again counts when it has failed for good."""
    return 0 if update.state in studies.FINISHED else failures + (update.state == TrialState.FAIL)


def listen(
    member: Member, pool: Pool, running: dict[Worker, Trial]
) -> Generator[tuple[Update, str]]:
    """What happens within WAIT_S seconds, and why a trial failed if it did."""
    for worker, message in pool.receive_messages(WAIT_S):
        try:
            update = hear(member, worker, running[worker], message)
        except ClaimLost:  # another member has the trial now
            pool.discard(worker)
            del running[worker]
            continue
        if update.state:
            del running[worker]
        yield update, message.reason if isinstance(message, RunResult) else ""


def hear(member: Member, worker: Worker, trial: Trial, message: Report | RunResult) -> Update:
    """Record what a worker says of its trial. Raises ClaimLost, and OSError for a full disk."""
    claim = trial.claim
    if isinstance(message, Report):
        progress = message.progress
        if progress.accuracy is not None:
            prune = member.report(claim, progress.samples, progress.accuracy)
            worker.reply(stop=prune and progress.samples < progress.total)
        return Update(claim.number, claim.params, progress)
    value = None
    if message.failure is None:
        state = TrialState.PRUNED if message.stopped else TrialState.COMPLETE
        resumed = {"resumed": True} if trial.resumed else {}
        value = member.tell(claim, state, None if message.stopped else message.accuracy, **resumed)
    elif message.failure == "disk":
        member.requeue(claim)
        raise OSError(message.reason)
    elif next_run := trial.run.retry(message):
        state = TrialState.WAITING
        keys = ("micro_batch", "deaths", "mark")
        member.requeue(claim, again={key: getattr(next_run, key) for key in keys})
    else:
        state = TrialState.FAIL
        member.tell(claim, state, fail_reason=f"{message.failure}: {message.reason}")
    if state != TrialState.WAITING and trial.run.checkpoint:
        trial.run.checkpoint.unlink(missing_ok=True)
    seconds = time.monotonic() - trial.start
    return Update(claim.number, claim.params, state=state, value=value, seconds=seconds)


def carry_out(
    pool: Pool, runs: Mapping[K, Run]
) -> Generator[tuple[K, Report | RunResult] | tuple[None, None]]:
    """Runs that are no trials; each is retried where that can help, and ends with a RunResult.

    Yields (None, None) at least every WAIT_S seconds. Raises OSError where a worker cannot write.
    """
    queue, busy = list(runs.items()), dict[Worker, tuple[K, Run]]()
    while queue or busy:
        for worker in pool.idle_workers()[: len(queue)]:
            busy[worker] = queue.pop(0)
            worker.start(busy[worker][1])
        for worker, message in pool.receive_messages(WAIT_S):
            key, run = busy[worker]
            if isinstance(message, Report):
                if message.progress.accuracy is not None:
                    worker.reply(stop=False)
                yield key, message
                continue
            del busy[worker]
            if message.failure == "disk":
                raise OSError(message.reason)
            if next_run := run.retry(message):
                queue.append((key, next_run))
                continue
            if run.checkpoint:
                run.checkpoint.unlink(missing_ok=True)
            yield key, message
        if busy:
            yield None, None


def speed(pool: Pool, run: Run) -> float:
    """Images a second that a worker trains, of a run with `measure`. Raises RunFailed."""
    for _, message in carry_out(pool, {"speed": run}):
        if isinstance(message, RunResult):
            if message.images_per_s is None:
                raise RunFailed(message.reason)
            return message.images_per_s
    raise AssertionError("a run ends with a RunResult")


def confirm(
    member: Member, pool: Pool, run_of: Callable[[FrozenTrial, int], Run], k: int
) -> Generator[tuple[int, int]]:
    """Train with the hyperparameters of the k best trials again, on fresh seeds.

    `run_of` makes the run of a trial, and of 0, 1, … for the seed. Each
    result is kept with the study as it comes in. A trial that fails so is set aside, and the next
    best takes its place. Yields (how many runs are done, of how many) now and then.
    """
    while best := member.run_locked(lambda study: studies.unconfirmed(study, k)):
        todo = {(trial.number, i): run_of(trial, i) for trial, missing in best for i in missing}
        total, done = len(todo), 0
        for key, message in carry_out(pool, todo):
            if key is not None and isinstance(message, RunResult):
                done += 1
                keep_confirmation(member, key, message)
            yield done, total


def keep_confirmation(member: Member, key: tuple[int, int], result: RunResult) -> None:
    """Record one confirmation, or that the trial's hyperparameters fail on a fresh seed."""
    number, i = key
    if result.failure:
        reason = f"{result.failure}: {result.reason}"
        member.run_locked(lambda study: studies.set_aside(study, number, reason))
    else:
        accuracy = result.accuracy
        assert accuracy is not None
        member.run_locked(lambda study: studies.confirm(study, number, i, accuracy))
