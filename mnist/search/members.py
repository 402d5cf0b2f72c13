"""Processes that share a study: who runs which trial, the exact trial budget, the leader."""

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist.search import liveness, storage
from mnist.search import study as studies
from mnist.search.liveness import Entries, Liveness
from mnist.search.space import DEFAULT, Space
from mnist.search.storage import SharedStudy

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

    A member changes a trial only under the study's lock, and only while it owns the trial. A dead
    member's RUNNING trials become WAITING: they are the next to be claimed, with the same number,
    parameters and checkpoint.
    """

    def __init__(self, url: str, name: str, threads: int) -> None:
        """`threads`: of one training process. Raises StudyError."""
        self.shared = SharedStudy(url, name)
        self.study = self.shared.study
        self.study_id: str = self.study.user_attrs["id"]
        self.threads = threads
        self._storage = self.shared.storage
        try:
            self.liveness = Liveness(self.shared.folder, self.shared.prefix)
        except OSError as error:
            raise storage.unusable_storage(url, str(error)) from error
        self._claims: dict[int, Claim] = {}  # trial id -> claim; changed under the lock
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._run_heartbeat, name="beat", daemon=True)

    @property
    def id(self) -> str:
        """Another one after other members have taken this one for dead."""
        return self.liveness.id

    def __enter__(self) -> "Member":
        self.poll()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the study; trials that this member still runs are requeued."""
        self._stopping.set()
        self._heartbeat.join()
        with contextlib.suppress(*storage.STORAGE_ERRORS), self.shared.lock():
            entries = self.entries()
            entries.pop(self.id, None)
            self.study.set_user_attr("members", entries)
            self._claims.clear()
            self._requeue_orphans(self.study.get_trials(deepcopy=False), entries)
        self.liveness.leave()
        self.shared.close()

    def _run_heartbeat(self) -> None:
        while not self._stopping.wait(liveness.HEARTBEAT_S):
            try:
                self._poll_once()
            except Exception as error:  # noqa: BLE001 - without heartbeats it loses its trials
                log.debug("no heartbeat: %s", error)

    def run_locked(self, action: Callable[[optuna.Study], T]) -> T:
        """Call `action` with the study under its lock, to read or change it; with retries."""
        return self.shared.run_locked(action)

    def poll(self) -> None:
        """Send a heartbeat, remove dead members, and requeue their RUNNING trials."""
        self.run_locked(self._poll)

    def _poll_once(self) -> None:
        with self.shared.lock():
            self._poll(self.study)

    def _poll(self, study: optuna.Study) -> None:
        entries = self.liveness.update(self.entries())
        study.set_user_attr("members", entries)
        self._requeue_orphans(study.get_trials(deepcopy=False), entries)

    def entries(self) -> Entries:
        """The members of the study."""
        return self.study.user_attrs.get("members", {})

    def become_leader(self) -> bool:
        """Whether this member finishes the study; it takes the lead where no living member has it.

        False after other members have taken this one for dead, until its next poll().
        """

        def take_lead(study: optuna.Study) -> bool:
            leader, entries = study.user_attrs.get("finisher"), self.entries()
            if self.id not in entries or (leader in entries and leader != self.id):
                return False
            if leader != self.id:
                study.set_user_attr("finisher", self.id)
            return True

        return self.run_locked(take_lead)

    # --- trials

    def ask(
        self, trials: int, seed: int, sampler: str = "tpe", space: Space = DEFAULT
    ) -> Claim | None:
        """Claim the next trial; None where finished and running trials already make `trials`."""
        before = dict(self._claims)

        def claim(study: optuna.Study) -> Claim | None:
            self._claims = dict(before)  # a trial claimed in a failed transaction has no owner
            existing = study.get_trials(deepcopy=False)
            if self._requeue_orphans(existing):
                existing = study.get_trials(deepcopy=False)
            counted = (*studies.FINISHED, TrialState.RUNNING)
            if sum(trial.state in counted for trial in existing) >= trials:
                return None
            trial = studies.ask(study, seed, sampler, existing, space)
            attrs = existing[trial.number].user_attrs if trial.number < len(existing) else {}
            threads = attrs.get("run", {}).get("threads", self.threads)
            trial.set_user_attr("run", {"by": self.id, "threads": threads})
            claim = Claim(trial.number, trial._trial_id, trial.params, self.id, threads, attrs)
            self._claims[claim.trial_id] = claim
            return claim

        try:
            return self.run_locked(claim)
        except BaseException:
            self._claims = before
            raise

    def report(self, claim: Claim, samples: int, accuracy: float) -> bool:
        """Record an intermediate accuracy; returns whether to prune. Raises ClaimLost."""

        def record(study: optuna.Study) -> bool:
            trial = self._get_claimed_trial(claim)
            if samples in trial.intermediate_values:  # reported before, but a process or a
                # connection ended before the decision: the pruner must not count the rung as
                # completed
                for key, value in list(trial.system_attrs.items()):
                    if key.startswith("completed_rung_") and value == accuracy:
                        del trial.system_attrs[key]
            self._storage.set_trial_intermediate_value(claim.trial_id, samples, accuracy)
            trial.intermediate_values[samples] = accuracy  # in this copy: saves a query
            return study.pruner.prune(study, trial)

        return self.run_locked(record)

    def tell(
        self, claim: Claim, state: TrialState, value: float | None = None, **attrs: Any
    ) -> float | None:
        """End a trial; returns its value, of a pruned trial the last report. Raises ClaimLost."""

        def end(_: optuna.Study) -> float | None:
            trial, final_value = self._get_claimed_trial(claim, state), value
            if state == TrialState.PRUNED and trial.last_step is not None:
                final_value = trial.intermediate_values[trial.last_step]
            if not trial.state.is_finished():
                self._set_state(claim, state, final_value, attrs)
            self._claims.pop(claim.trial_id, None)
            return final_value

        return self.run_locked(end)

    def requeue(self, claim: Claim, **attrs: Any) -> None:
        """Set a trial to WAITING, so that any member can claim it. Raises ClaimLost."""

        def set_waiting(_: optuna.Study) -> None:
            self._get_claimed_trial(claim, TrialState.WAITING)
            self._set_state(claim, TrialState.WAITING, None, attrs)
            self._claims.pop(claim.trial_id, None)

        self.run_locked(set_waiting)

    def requeue_all(self) -> None:
        """Requeue all trials of this member; a single attempt, as the command is ending."""
        self._claims.clear()
        with contextlib.suppress(*storage.STORAGE_ERRORS):  # must not hide why the command ends
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

    def _set_state(
        self, claim: Claim, state: TrialState, value: float | None, attrs: dict[str, Any]
    ) -> None:
        for key, content in attrs.items():
            self._storage.set_trial_user_attr(claim.trial_id, key, content)
        values = None if value is None else [value]
        self._storage.set_trial_state_values(claim.trial_id, state, values)

    def _requeue_orphans(self, trials: list[FrozenTrial], entries: Entries | None = None) -> bool:
        """Requeue RUNNING trials without a process: those of no member, and those recorded as this
        member's without a claim, because it was suspended or disconnected in a transaction."""
        requeued = False
        for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
            owner = trial.user_attrs.get("run", {}).get("by")
            claim = self._claims.get(trial._trial_id)
            is_mine = claim is not None and owner == self.id == claim.owner
            is_others = owner != self.id and (entries is None or owner in entries)
            if not is_mine and not is_others:
                self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                requeued = True
        return requeued
