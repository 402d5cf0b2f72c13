"""Who works on a study: each command is a member. Turns, leases, the exact budget, the finisher."""

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

from mnist import study as studies
from mnist.space import DEFAULT, Space

BEAT_S = 10.0
GRACE_S = 60.0  # a member on another machine that was silent for so long is taken for dead
RETRY_S = 180.0  # how long a lost database is asked again
OPEN_S = 30.0  # how long one that does not answer yet is
# What is said then, or where this process was stopped; not of a wrong password.
AWAY = ("refused", "starting up", "shutting down", "transaction timeout", "lock timeout")
TRIES = 3  # at least: a process may have been stopped in its first one for longer than all that

log = logging.getLogger(__name__)
T = TypeVar("T")


class Lost(RuntimeError):
    """The trial is no longer this member's: it was silent for too long, and another one took it."""


@dataclass(frozen=True)
class Claim:
    """A trial that one member runs; `owner` is the member's id when it took it."""

    number: int
    trial_id: int
    params: dict[str, Any]
    owner: str
    threads: int  # those that it began with: others would give other roundings
    attrs: dict[str, Any]


class Member:
    """One command's part in a study, from `with` to its end.

    Every change of a trial is made in a turn, which one process at a time has, and only where the
    trial is still this member's. While it lives, a member holds a file lock that the operating
    system frees with the process, and a thread counts up its `beat` in the study. Others on this
    machine (`host`) look at the lock, so that slowness never counts as death; others elsewhere
    look at the beat, by their own clock and only while they reach the database themselves. What a
    dead member left RUNNING becomes WAITING: it is asked for first, keeps its number, parameters
    and checkpoint.
    """

    def __init__(self, storage: str, name: str, threads: int) -> None:
        """`threads` are those of one training process. Raises StudyError."""
        file = studies.sqlite_file(storage)
        folder = file.parent if file else Path(tempfile.gettempdir())
        if not folder.is_dir():  # its lock's file would make it
            raise studies.unusable(storage, f"there is no folder {folder}")
        # Not by the URL: one database server has many spellings.
        key = hashlib.sha256(f"{file or ''} {name}".encode()).hexdigest()[:12]
        self._folder, self._prefix = folder, f".study-{key}"
        self._claims: dict[int, Claim] = {}
        self._remote = file is None
        try:
            self._engine = create_engine(storage, **studies.engine_kwargs(storage))
            self._turns = turns(self._engine, folder / f"{self._prefix}.lock")
            self.study = self._opened(storage, name)
            self.study_id: str = self.study.user_attrs["id"]
            self._host = host(folder)
        except (OSError, ImportError, *studies.STORAGE_ERRORS) as error:
            raise studies.unusable(storage, str(error.__cause__ or error)) from error
        self._trials = self.study._storage
        self.threads = threads
        self._silent: dict[str, tuple[int, float]] = {}  # id -> beat, seconds without a new one
        self._looked = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="beat", daemon=True)
        self._join()

    def _opened(self, storage: str, name: str) -> optuna.Study:
        """The study; a server that is just restarting is waited for."""

        def attempt() -> optuna.Study:
            # Tables are made once a database, whatever the study.
            with turns(self._engine, self._folder / ".study-open.lock")():
                return studies.open_study(storage, name)

        def away(error: BaseException) -> bool:
            return self._remote and any(words in str(error) for words in AWAY)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(away),
            wait=tenacity.wait_fixed(1),
            stop=_after(OPEN_S),
            reraise=True,
        )(attempt)

    def _join(self) -> None:
        self.id = uuid4().hex[:12]
        self._alive = FileLock(self._folder / f"{self._prefix}-{self.id}.lock")
        self._alive.acquire(timeout=0)

    def __enter__(self) -> "Member":
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave; what this member still ran waits for whoever asks next."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(*studies.STORAGE_ERRORS), self._turns():
            members = self._members()
            members.pop(self.id, None)
            self.study.set_user_attr("members", members)
            self._claims.clear()
            self._free(self.study.get_trials(deepcopy=False), members)
        self._leave()
        self._trials.remove_session()
        for engine in (self._engine, self._trials._backend.engine):  # type: ignore[attr-defined]
            engine.dispose()

    def _leave(self) -> None:
        self._alive.release()
        Path(self._alive.lock_file).unlink(missing_ok=True)

    # --- trials

    def ask(
        self, trials: int, seed: int, sampler: str = "tpe", space: Space = DEFAULT
    ) -> Claim | None:
        """The next trial to run; None where finished and running ones already make `trials`."""

        def attempt() -> Claim | None:
            known = dict(self._claims)
            try:
                with self._turns():
                    return self._claim(trials, seed, sampler, space)
            except BaseException:  # the turn was lost before its end: a trial of it is nobody's
                self._claims = known
                raise

        return self._steadily(attempt)

    def _claim(self, trials: int, seed: int, sampler: str, space: Space) -> Claim | None:
        """What ask() does in its turn."""
        past = self.study.get_trials(deepcopy=False)
        if self._free(past):
            past = self.study.get_trials(deepcopy=False)
        taken = (*studies.FINISHED, TrialState.RUNNING)
        if sum(trial.state in taken for trial in past) >= trials:
            return None
        trial = studies.ask(self.study, seed, sampler, past, space)
        attrs = past[trial.number].user_attrs if trial.number < len(past) else {}
        threads = attrs.get("run", {}).get("threads", self.threads)
        trial.set_user_attr("run", {"by": self.id, "threads": threads})
        claim = Claim(trial.number, trial._trial_id, trial.params, self.id, threads, attrs)
        self._claims[claim.trial_id] = claim
        return claim

    def report(self, claim: Claim, samples: int, accuracy: float) -> bool:
        """Record an accuracy in mid-trial; whether the trial is to be pruned. Raises Lost."""

        def attempt() -> bool:
            with self._turns():
                trial = self._mine(claim)
                if samples in trial.intermediate_values:  # told before, but the verdict was lost
                    # with a process or a connection; the pruner is not to take it for passed
                    for key, value in list(trial.system_attrs.items()):
                        if key.startswith("completed_rung_") and value == accuracy:
                            del trial.system_attrs[key]
                self._trials.set_trial_intermediate_value(claim.trial_id, samples, accuracy)
                trial.intermediate_values[samples] = accuracy  # of a copy: spares a query
                return self.study.pruner.prune(self.study, trial)

        return self._steadily(attempt)

    def tell(
        self, claim: Claim, state: TrialState, value: float | None = None, **attrs: Any
    ) -> float | None:
        """End a trial; returns its value, for a pruned one the last reported. Raises Lost."""

        def attempt() -> float | None:
            with self._turns():
                trial, told = self._mine(claim, state), value
                if state == TrialState.PRUNED and trial.last_step is not None:
                    told = trial.intermediate_values[trial.last_step]
                if not trial.state.is_finished():
                    for key, content in attrs.items():
                        self._trials.set_trial_user_attr(claim.trial_id, key, content)
                    values = None if told is None else [told]
                    self._trials.set_trial_state_values(claim.trial_id, state, values)
                self._claims.pop(claim.trial_id, None)
                return told

        return self._steadily(attempt)

    def give_back(self, claim: Claim, **attrs: Any) -> None:
        """Let the trial wait for whoever asks next. Raises Lost."""

        def attempt() -> None:
            with self._turns():
                self._mine(claim, TrialState.WAITING)
                for key, content in attrs.items():
                    self._trials.set_trial_user_attr(claim.trial_id, key, content)
                self._trials.set_trial_state_values(claim.trial_id, TrialState.WAITING)
                self._claims.pop(claim.trial_id, None)

        self._steadily(attempt)

    def abandon(self) -> None:
        """Let all that this member runs wait for whoever asks next; tried once, at an end."""
        self._claims.clear()
        with contextlib.suppress(*studies.STORAGE_ERRORS):  # nor hide why it ended
            self._look()

    def _mine(self, claim: Claim, then: TrialState | None = None) -> FrozenTrial:
        """The trial, if it is still this claim's; `then`: or already is what it should become."""
        trial = self._trials.get_trial(claim.trial_id)
        if trial.user_attrs.get("run", {}).get("by") != claim.owner or trial.state not in (
            TrialState.RUNNING,
            then,
        ):
            raise Lost(f"trial {claim.number} was taken over")
        return trial

    # --- the study

    def update(self, change: Callable[[optuna.Study], T]) -> T:
        """Read or change the study while no other member does, also where its server was lost."""

        def attempt() -> T:
            with self._turns():
                return change(self.study)

        return self._steadily(attempt)

    def finisher(self) -> bool:
        """Whether this member is the one that finishes the study, or is it from now on.

        Not after it was taken for dead, until its next look().
        """

        def attempt(study: optuna.Study) -> bool:
            holder, members = study.user_attrs.get("finisher"), self._members()
            if self.id not in members or (holder in members and holder != self.id):
                return False
            if holder != self.id:
                study.set_user_attr("finisher", self.id)
            return True

        return self.update(attempt)

    # --- who lives

    def look(self) -> None:
        """Show that this member lives, find those that do not, and free what they left RUNNING."""
        self._steadily(self._look)

    def _look(self) -> None:
        with self._turns():
            now = time.monotonic()
            passed, self._looked = min(now - self._looked, 2 * BEAT_S), now
            members = self._members()
            if self.id in self._silent and self.id not in members:  # it was taken for dead
                self._leave()
                self._join()
            beat = members.get(self.id, {"beat": 0})["beat"] + 1
            lock = Path(self._alive.lock_file).name
            members[self.id] = {"host": self._host, "lock": lock, "beat": beat}
            self._silent[self.id] = (beat, 0.0)
            others = [name for name in members if name != self.id]
            for name in others:
                if self._dead(name, members[name], passed):
                    del members[name]
            self.study.set_user_attr("members", members)
            self._free(self.study.get_trials(deepcopy=False), members)

    def _dead(self, name: str, about: dict[str, Any], passed: float) -> bool:
        lock = self._folder / about["lock"]
        if about["host"] == self._host and lock.exists():
            return _freed(lock)
        beat, silent = self._silent.get(name, (None, 0.0))
        silent = silent + passed if beat == about["beat"] else 0.0
        self._silent[name] = (about["beat"], silent)
        return silent > GRACE_S

    def _free(self, trials: list[FrozenTrial], members: dict[str, Any] | None = None) -> bool:
        """Let RUNNING trials that nobody runs wait: those of no member, and those that are said
        to be this member's but are not, because it was stopped or cut off in mid-turn."""
        freed = False
        for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
            by, claim = trial.user_attrs.get("run", {}).get("by"), self._claims.get(trial._trial_id)
            mine = claim is not None and by == self.id == claim.owner
            others = by != self.id and (members is None or by in members)
            if not mine and not others:
                self._trials.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                freed = True
        return freed

    def _members(self) -> dict[str, Any]:
        return self.study.user_attrs.get("members", {})

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - without a beat it would lose its trials
                log.debug("no beat: %s", error)

    def _steadily(self, attempt: Callable[[], T]) -> T:
        """Try for RETRY_S where a database server was lost; a full disk is no such case."""

        def lost(error: BaseException) -> bool:
            # InternalError: the server ended the session of a process that had stalled in its turn.
            kinds = OperationalError | InterfaceError | InternalError
            while error is not None and not isinstance(error, kinds):
                error = error.__cause__  # type: ignore[assignment]
            return self._remote and error is not None

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(lost),
            wait=tenacity.wait_random_exponential(max=BEAT_S),
            stop=_after(RETRY_S),
            reraise=True,
        )(attempt)


def _after(seconds: float) -> tenacity.stop.stop_base:
    return tenacity.stop_all(tenacity.stop_after_delay(seconds), tenacity.stop_after_attempt(TRIES))


def host(folder: Path) -> str:
    """This machine, for locks in `folder`: containers that share a name do not share the folder."""
    boot, place = Path("/proc/sys/kernel/random/boot_id"), folder.stat()
    parts = [socket.gethostname(), boot.read_text() if boot.exists() else ""]
    parts += [str(place.st_dev), str(place.st_ino)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def _freed(path: Path) -> bool:
    """Whether nobody holds the lock, which is deleted then."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    path.unlink(missing_ok=True)
    return True


def turns(engine: Engine, file: Path) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What one process at a time can enter: the file's lock, or on PostgreSQL an advisory lock."""
    if engine.dialect.name != "postgresql":

        @contextlib.contextmanager
        def turn() -> Iterator[None]:
            with FileLock(file), uninterrupted():  # a new one each time: it holds off threads too
                yield

        return turn
    key = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big", signed=True)

    @contextlib.contextmanager
    def advised() -> Iterator[None]:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            with uninterrupted():
                yield

    return advised


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block: in mid-statement they break connections."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def later(number: int, _: Any) -> None:
        if caught:  # asked twice: the database may hang
            raise KeyboardInterrupt
        caught.append(number)

    before = {sign: signal.signal(sign, later) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
        if caught:
            signal.raise_signal(caught[0])
