"""Processes that share a study: locks, leases, heartbeats, the exact trial budget, the leader."""

import contextlib
import hashlib
import logging
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import optuna
import tenacity
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError

from mnist.search import study as studies
from mnist.search.space import DEFAULT, Space

HEARTBEAT_S = 10.0
GRACE_PERIOD_S = 60.0  # silence after which a member on another machine counts as dead
RETRY_S = 180.0  # duration of retries after a lost database connection
OPEN_RETRY_S = 30.0  # duration of retries while a database does not accept connections
# Texts of errors from a server that is starting or stopping, or of a stalled process; a wrong
# password has none of them.
TRANSIENT_ERRORS = (
    *("refused", "starting up", "shutting down"),
    *("transaction timeout", "lock timeout"),
)
MIN_ATTEMPTS = 3  # the process may be suspended in its first attempt for longer than the retries

log = logging.getLogger(__name__)
T = TypeVar("T")


class ClaimLost(RuntimeError):
    """The member was silent for too long, and another member has its trial."""


@dataclass(frozen=True)
class Claim:
    """A trial that one member runs; `owner` is the member's id at the time of the claim."""

    number: int
    trial_id: int
    params: dict[str, Any]
    owner: str
    threads: int  # of the first run of this trial: another number rounds differently
    attrs: dict[str, Any]


class Member:
    """One command's membership in a study, for the duration of a `with` block.

    A member changes a trial only under the study's lock, and only while it owns the trial. A living
    member holds a file lock, which the operating system releases with the process, and a thread
    increments the member's `beat` in the study. Members on the same machine (`host`) check the file
    lock, so a slow member never counts as dead. Members on other machines watch the beat, by their
    own clock, and only while they reach the database themselves. A dead member's RUNNING trials
    become WAITING: they are the next to be claimed, with the same number, parameters and
    checkpoint.
    """

    def __init__(self, storage: str, name: str, threads: int) -> None:
        """`threads`: of one training process. Raises StudyError."""
        file = studies.sqlite_file(storage)
        folder = file.parent if file else Path(tempfile.gettempdir())
        if not folder.is_dir():  # creating the lock file would create the folder
            raise studies.unusable_storage(storage, f"there is no folder {folder}")
        # Not from the URL: one database server has many spellings.
        key = hashlib.sha256(f"{file or ''} {name}".encode()).hexdigest()[:12]
        self._folder, self._prefix = folder, f".study-{key}"
        self._claims: dict[int, Claim] = {}
        self._is_remote = file is None
        try:
            self._engine = create_engine(storage, **studies.engine_kwargs(storage))
            self._lock = make_lock(self._engine, folder / f"{self._prefix}.lock")
            self.study = self._open_study(storage, name)
            self.study_id: str = self.study.user_attrs["id"]
            self._host = host_id(folder)
        except (OSError, ImportError, *studies.STORAGE_ERRORS) as error:
            raise studies.unusable_storage(storage, str(error.__cause__ or error)) from error
        self._storage = self.study._storage
        self.threads = threads
        self._silence: dict[str, tuple[int, float]] = {}  # id -> last beat, seconds since then
        self._polled_at = time.monotonic()
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._run_heartbeat, name="beat", daemon=True)
        self._join()

    def _open_study(self, storage: str, name: str) -> optuna.Study:
        """Open the study; retries while the server is starting."""

        def open_locked() -> optuna.Study:
            # Creates the database's tables, which all studies share.
            with make_lock(self._engine, self._folder / ".study-open.lock")():
                return studies.open_study(storage, name)

        def is_transient(error: BaseException) -> bool:
            return self._is_remote and any(words in str(error) for words in TRANSIENT_ERRORS)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_fixed(1),
            stop=_stop_after(OPEN_RETRY_S),
            reraise=True,
        )(open_locked)

    def _join(self) -> None:
        self.id = uuid4().hex[:12]
        self._liveness_lock = FileLock(self._folder / f"{self._prefix}-{self.id}.lock")
        self._liveness_lock.acquire(timeout=0)

    def __enter__(self) -> "Member":
        self.poll()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the study; trials that this member still runs are requeued."""
        self._stopping.set()
        self._heartbeat.join()
        with contextlib.suppress(*studies.STORAGE_ERRORS), self._lock():
            members = self._read_members()
            members.pop(self.id, None)
            self.study.set_user_attr("members", members)
            self._claims.clear()
            self._requeue_orphans(self.study.get_trials(deepcopy=False), members)
        self._leave()
        self._storage.remove_session()
        for engine in (self._engine, self._storage._backend.engine):  # type: ignore[attr-defined]
            engine.dispose()

    def _leave(self) -> None:
        self._liveness_lock.release()
        Path(self._liveness_lock.lock_file).unlink(missing_ok=True)

    # --- trials

    def ask(
        self, trials: int, seed: int, sampler: str = "tpe", space: Space = DEFAULT
    ) -> Claim | None:
        """Claim the next trial; None where finished and running trials already make `trials`."""

        def claim_locked() -> Claim | None:
            claims_before = dict(self._claims)
            try:
                with self._lock():
                    return self._claim(trials, seed, sampler, space)
            except BaseException:  # the transaction failed: a trial claimed in it has no owner
                self._claims = claims_before
                raise

        return self._retry(claim_locked)

    def _claim(self, trials: int, seed: int, sampler: str, space: Space) -> Claim | None:
        """The part of ask() under the lock."""
        existing = self.study.get_trials(deepcopy=False)
        if self._requeue_orphans(existing):
            existing = self.study.get_trials(deepcopy=False)
        counted = (*studies.FINISHED, TrialState.RUNNING)
        if sum(trial.state in counted for trial in existing) >= trials:
            return None
        trial = studies.ask(self.study, seed, sampler, existing, space)
        attrs = existing[trial.number].user_attrs if trial.number < len(existing) else {}
        threads = attrs.get("run", {}).get("threads", self.threads)
        trial.set_user_attr("run", {"by": self.id, "threads": threads})
        claim = Claim(trial.number, trial._trial_id, trial.params, self.id, threads, attrs)
        self._claims[claim.trial_id] = claim
        return claim

    def report(self, claim: Claim, samples: int, accuracy: float) -> bool:
        """Record an intermediate accuracy; returns whether to prune. Raises ClaimLost."""

        def report_locked() -> bool:
            with self._lock():
                trial = self._get_claimed_trial(claim)
                if samples in trial.intermediate_values:  # reported before, but a process or a
                    # connection ended before the decision: the pruner must not count the rung as
                    # completed
                    for key, value in list(trial.system_attrs.items()):
                        if key.startswith("completed_rung_") and value == accuracy:
                            del trial.system_attrs[key]
                self._storage.set_trial_intermediate_value(claim.trial_id, samples, accuracy)
                trial.intermediate_values[samples] = accuracy  # in this copy: saves a query
                return self.study.pruner.prune(self.study, trial)

        return self._retry(report_locked)

    def tell(
        self, claim: Claim, state: TrialState, value: float | None = None, **attrs: Any
    ) -> float | None:
        """End a trial; returns its value, of a pruned trial the last report. Raises ClaimLost."""

        def tell_locked() -> float | None:
            with self._lock():
                trial, final_value = self._get_claimed_trial(claim, state), value
                if state == TrialState.PRUNED and trial.last_step is not None:
                    final_value = trial.intermediate_values[trial.last_step]
                if not trial.state.is_finished():
                    for key, content in attrs.items():
                        self._storage.set_trial_user_attr(claim.trial_id, key, content)
                    values = None if final_value is None else [final_value]
                    self._storage.set_trial_state_values(claim.trial_id, state, values)
                self._claims.pop(claim.trial_id, None)
                return final_value

        return self._retry(tell_locked)

    def requeue(self, claim: Claim, **attrs: Any) -> None:
        """Set a trial to WAITING, so that any member can claim it. Raises ClaimLost."""

        def requeue_locked() -> None:
            with self._lock():
                self._get_claimed_trial(claim, TrialState.WAITING)
                for key, content in attrs.items():
                    self._storage.set_trial_user_attr(claim.trial_id, key, content)
                self._storage.set_trial_state_values(claim.trial_id, TrialState.WAITING)
                self._claims.pop(claim.trial_id, None)

        self._retry(requeue_locked)

    def requeue_all(self) -> None:
        """Requeue all trials of this member; a single attempt, as the command is ending."""
        self._claims.clear()
        with contextlib.suppress(*studies.STORAGE_ERRORS):  # must not hide why the command ends
            self._poll_once()

    def _get_claimed_trial(self, claim: Claim, new_state: TrialState | None = None) -> FrozenTrial:
        """The trial if the claim still holds: RUNNING, or already in `new_state`."""
        trial = self._storage.get_trial(claim.trial_id)
        if trial.user_attrs.get("run", {}).get("by") != claim.owner or trial.state not in (
            TrialState.RUNNING,
            new_state,
        ):
            raise ClaimLost(f"trial {claim.number} was taken over")
        return trial

    # --- the study

    def run_locked(self, change: Callable[[optuna.Study], T]) -> T:
        """Call `change` with the study under its lock, to read or change it; with retries."""

        def change_locked() -> T:
            with self._lock():
                return change(self.study)

        return self._retry(change_locked)

    def become_leader(self) -> bool:
        """Whether this member finishes the study; it takes the lead where no living member has it.

        False after other members have taken this one for dead, until its next poll().
        """

        def take_lead(study: optuna.Study) -> bool:
            leader, members = study.user_attrs.get("finisher"), self._read_members()
            if self.id not in members or (leader in members and leader != self.id):
                return False
            if leader != self.id:
                study.set_user_attr("finisher", self.id)
            return True

        return self.run_locked(take_lead)

    # --- liveness

    def poll(self) -> None:
        """Send a heartbeat, remove dead members, and requeue their RUNNING trials."""
        self._retry(self._poll_once)

    def _poll_once(self) -> None:
        with self._lock():
            now = time.monotonic()
            elapsed, self._polled_at = min(now - self._polled_at, 2 * HEARTBEAT_S), now
            members = self._read_members()
            if self.id in self._silence and self.id not in members:  # others took it for dead
                self._leave()
                self._join()
            beat = members.get(self.id, {"beat": 0})["beat"] + 1
            lock = Path(self._liveness_lock.lock_file).name
            members[self.id] = {"host": self._host, "lock": lock, "beat": beat}
            self._silence[self.id] = (beat, 0.0)
            others = [name for name in members if name != self.id]
            for name in others:
                if self._is_dead(name, members[name], elapsed):
                    del members[name]
            self.study.set_user_attr("members", members)
            self._requeue_orphans(self.study.get_trials(deepcopy=False), members)

    def _is_dead(self, name: str, entry: dict[str, Any], elapsed: float) -> bool:
        lock = self._folder / entry["lock"]
        if entry["host"] == self._host and lock.exists():
            return _remove_if_free(lock)
        beat, silence = self._silence.get(name, (None, 0.0))
        silence = silence + elapsed if beat == entry["beat"] else 0.0
        self._silence[name] = (entry["beat"], silence)
        return silence > GRACE_PERIOD_S

    def _requeue_orphans(
        self, trials: list[FrozenTrial], members: dict[str, Any] | None = None
    ) -> bool:
        """Requeue RUNNING trials without a process: those of no member, and those recorded as this
        member's without a claim, because it was suspended or disconnected in a transaction."""
        requeued = False
        for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
            owner = trial.user_attrs.get("run", {}).get("by")
            claim = self._claims.get(trial._trial_id)
            is_mine = claim is not None and owner == self.id == claim.owner
            is_others = owner != self.id and (members is None or owner in members)
            if not is_mine and not is_others:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                requeued = True
        return requeued

    def _read_members(self) -> dict[str, Any]:
        return self.study.user_attrs.get("members", {})

    def _run_heartbeat(self) -> None:
        while not self._stopping.wait(HEARTBEAT_S):
            try:
                self._poll_once()
            except Exception as error:  # noqa: BLE001 - without heartbeats it loses its trials
                log.debug("no heartbeat: %s", error)

    def _retry(self, action: Callable[[], T]) -> T:
        """Retry for RETRY_S while the database server is lost; other errors are raised at once."""

        def is_connection_lost(error: BaseException) -> bool:
            # InternalError: the server ended the session of a process that stalled under the lock.
            kinds = OperationalError | InterfaceError | InternalError
            while error is not None and not isinstance(error, kinds):
                error = error.__cause__  # type: ignore[assignment]
            return self._is_remote and error is not None

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_connection_lost),
            wait=tenacity.wait_random_exponential(max=HEARTBEAT_S),
            stop=_stop_after(RETRY_S),
            reraise=True,
        )(action)


def _stop_after(seconds: float) -> tenacity.stop.stop_base:
    attempts = tenacity.stop_after_attempt(MIN_ATTEMPTS)
    return tenacity.stop_all(tenacity.stop_after_delay(seconds), attempts)


def host_id(folder: Path) -> str:
    """An id of this machine for locks in `folder`: containers of one name have other folders."""
    boot_id, status = Path("/proc/sys/kernel/random/boot_id"), folder.stat()
    parts = [socket.gethostname(), boot_id.read_text() if boot_id.exists() else ""]
    parts += [str(status.st_dev), str(status.st_ino)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _remove_if_free(path: Path) -> bool:
    """Delete a lock file that no process holds; returns whether it did."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    path.unlink(missing_ok=True)
    return True


def make_lock(engine: Engine, file: Path) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A lock between processes: on the file, or on PostgreSQL an advisory lock."""
    if engine.dialect.name != "postgresql":

        @contextlib.contextmanager
        def file_locked() -> Iterator[None]:
            with FileLock(file), defer_signals():  # a new object each time: also excludes threads
                yield

        return file_locked
    key = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big", signed=True)

    @contextlib.contextmanager
    def advisory_locked() -> Iterator[None]:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            with defer_signals():
                yield

    return advisory_locked


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the block: within a statement they break connections.

    A second signal raises KeyboardInterrupt at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []

    def defer(number: int, _: Any) -> None:
        if pending:  # the database may hang
            raise KeyboardInterrupt
        pending.append(number)

    handlers = {signum: signal.signal(signum, defer) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if pending:
            signal.raise_signal(pending[0])
