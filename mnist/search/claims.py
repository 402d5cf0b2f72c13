"""The trials of a study: which member runs which trial, and how many trials run."""

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist.search import study as studies
from mnist.search.existing import reject_trials
from mnist.search.liveness import Entries, Liveness
from mnist.search.space import DEFAULT, Space
from mnist.search.storage import SharedStudy


class ClaimLost(RuntimeError):
    """The member was silent for too long, and another member runs its trial now."""


@dataclass(frozen=True)
class Claim:
    """A trial that one member runs; `owner` is the member's id at the time of the claim."""

    number: int
    trial_id: int
    params: dict[str, Any]
    owner: str
    threads: int  # of the first run of this trial: another number of threads rounds differently
    attrs: dict[str, Any]


class Trials:
    """The trials of a study, as one member claims and ends them.

    A member changes a trial only under the study's lock, and only while it owns the trial.
    """

    def __init__(self, shared: SharedStudy, liveness: Liveness, threads: int) -> None:
        """`threads`: of one training process."""
        self._shared, self._liveness, self._threads = shared, liveness, threads
        self._claims: dict[int, Claim] = {}  # trial id -> claim; changed under the lock

    def ask(
        self, trials: int, seed: int, sampler: str = "tpe", space: Space = DEFAULT
    ) -> Claim | None:
        """Claim the next trial; None where finished and running trials already make `trials`."""
        before = dict(self._claims)

        def claim(study: optuna.Study) -> Claim | None:
            self._claims = dict(before)  # a trial claimed in a failed transaction has no owner
            existing = study.get_trials(deepcopy=False)
            if self.requeue_orphans(existing) | reject_trials(study, existing, space):
                existing = study.get_trials(deepcopy=False)
            counted = (*studies.FINISHED, TrialState.RUNNING)
            if sum(trial.state in counted for trial in existing) >= trials:
                return None
            trial = studies.ask(study, seed, sampler, existing, space)
            attrs = existing[trial.number].user_attrs if trial.number < len(existing) else {}
            threads = attrs.get("run", {}).get("threads", self._threads)
            me = self._liveness.id
            trial.set_user_attr("run", {"by": me, "threads": threads})
            claim = Claim(
                trial.number, trial._trial_id, trial.params, self._liveness.id, threads, attrs
            )
            self._claims[claim.trial_id] = claim
            return claim

        try:
            return self._shared.run_locked(claim)
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
            self._shared.storage.set_trial_intermediate_value(claim.trial_id, samples, accuracy)
            trial.intermediate_values[samples] = accuracy  # in this copy: saves a query
            return study.pruner.prune(study, trial)

        return self._shared.run_locked(record)

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

        return self._shared.run_locked(end)

    def requeue(self, claim: Claim, **attrs: Any) -> None:
        """Set a trial to WAITING, so that any member can claim it. Raises ClaimLost."""

        def set_waiting(_: optuna.Study) -> None:
            self._get_claimed_trial(claim, TrialState.WAITING)
            self._set_state(claim, TrialState.WAITING, None, attrs)
            self._claims.pop(claim.trial_id, None)

        self._shared.run_locked(set_waiting)

    def drop_claims(self) -> None:
        """Give up all claims; requeue_orphans() then requeues their trials."""
        self._claims.clear()

    def requeue_orphans(self, trials: list[FrozenTrial], entries: Entries | None = None) -> bool:
        """Requeue RUNNING trials without a process: those of no member, and those recorded as this
        member's without a claim, because it was suspended or disconnected in a transaction."""
        requeued = False
        for trial in (trial for trial in trials if trial.state == TrialState.RUNNING):
            owner = trial.user_attrs.get("run", {}).get("by")
            claim = self._claims.get(trial._trial_id)
            is_mine = claim is not None and owner == self._liveness.id == claim.owner
            is_others = owner != self._liveness.id and (entries is None or owner in entries)
            if not is_mine and not is_others:
                self._shared.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                requeued = True
        return requeued

    def _get_claimed_trial(self, claim: Claim, new_state: TrialState | None = None) -> FrozenTrial:
        """The trial if the claim still holds: RUNNING, or already in `new_state`."""
        trial = self._shared.storage.get_trial(claim.trial_id)
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
            self._shared.storage.set_trial_user_attr(claim.trial_id, key, content)
        values = None if value is None else [value]
        self._shared.storage.set_trial_state_values(claim.trial_id, state, values)
