"""Processes that share a study: which are alive, and which one leads."""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import optuna

from mnist.search import liveness, storage
from mnist.search.claims import Trials
from mnist.search.liveness import Entries, Liveness
from mnist.search.storage import SharedStudy

log = logging.getLogger(__name__)
T = TypeVar("T")


class Member:
    """One command's membership in a study, for the duration of a `with` block.

    A dead member's RUNNING trials become WAITING: they are the next to be claimed, with the same
    number, parameters and checkpoint.
    """

    def __init__(self, url: str, name: str, threads: int) -> None:
        """`threads`: of one training process. Raises StudyError."""
        self.shared = SharedStudy(url, name)
        self.study = self.shared.study
        self.name, self.study_id = self.shared.name, self.shared.id
        try:
            self.liveness = Liveness(self.shared.folder, self.shared.prefix)
        except OSError as error:
            raise storage.unusable_storage(url, str(error)) from error
        self.trials = Trials(self.shared, self.liveness, threads)
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._run_heartbeat, name="beat", daemon=True)

    @property
    def id(self) -> str:
        """The member's id; it changes after other members have declared this one dead."""
        return self.liveness.id

    def __enter__(self) -> "Member":
        self.poll()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the study; trials that this member still runs are requeued."""
        self._stopping.set()
        self._heartbeat.join()
        with contextlib.suppress(storage.StorageError), self.shared.locked():
            entries = self.entries()
            entries.pop(self.id, None)
            self.study.set_user_attr("members", entries)
            self.trials.drop_claims()
            self.trials.requeue_orphans(self.study.get_trials(deepcopy=False), entries)
        self.liveness.leave()
        self.shared.close()

    def _run_heartbeat(self) -> None:
        while not self._stopping.wait(liveness.HEARTBEAT_S):
            try:
                self._poll_once()
            except Exception as error:  # noqa: BLE001 - without heartbeats it loses its trials
                log.debug("no heartbeat: %s", error)

    def run_locked(self, action: Callable[[optuna.Study], T]) -> T:
        """Call `action` with the study under its lock, to read or change it; with retries.

        Raises storage.StorageError, and storage.StudyGone after a removal of the study."""
        return self.shared.run_locked(action)

    def poll(self) -> None:
        """Send a heartbeat, remove dead members, and requeue their RUNNING trials. Raises
        storage.StudyGone."""
        self.run_locked(self._poll)

    def requeue_all(self) -> None:
        """Requeue all trials of this member; a single attempt, as the command is ending."""
        self.trials.drop_claims()
        with contextlib.suppress(storage.StorageError):  # must not hide why the command ends
            self._poll_once()

    def _poll_once(self) -> None:
        with self.shared.locked() as study:
            self._poll(study)

    def _poll(self, study: optuna.Study) -> None:
        entries = self.liveness.update(self.entries())
        study.set_user_attr("members", entries)
        self.trials.requeue_orphans(study.get_trials(deepcopy=False), entries)

    def entries(self) -> Entries:
        """The members of the study."""
        return self.study.user_attrs.get("members", {})

    def become_leader(self) -> bool:
        """Whether this member finishes the study; it becomes the leader if no living member is.

        False after other members have declared this one dead, until its next poll().
        """

        def take_lead(study: optuna.Study) -> bool:
            leader, entries = study.user_attrs.get("finisher"), self.entries()
            if self.id not in entries or (leader in entries and leader != self.id):
                return False
            if leader != self.id:
                study.set_user_attr("finisher", self.id)
            return True

        return self.run_locked(take_lead)
