"""Logs a study to experiment trackers, beside the search and without a delay of it.

Each tracker has a thread, which reads finished trials from the study: a slow tracker lags behind,
and what a failing one lacks is logged by the next command.
"""

import datetime
import logging
import threading
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from mnist.job.options import Options
from mnist.job.trackers import TRACKERS, Entry, Tracker
from mnist.masking import mask_text
from mnist.search.members import Member
from mnist.shell import first_line

POLL_INTERVAL_S = 5.0
FLUSH_S = 60.0  # how long a finished command waits for its trackers, e.g. for an upload

log = logging.getLogger(__name__)


class Tracking:
    """Logs finished trials from start() on, and a model given to add_model(); a context manager.

    Errors of a tracker are one warning; they neither end nor delay the search.
    """

    def __init__(self, member: Member, options: Options) -> None:
        self._member, self._options = member, options
        self._model: Entry | None = None
        self._stopping = threading.Event()
        self._threads = {
            name: threading.Thread(target=self._run, args=(name,), name=name, daemon=True)
            for name in options.track
        }

    def __enter__(self) -> "Tracking":
        return self

    def start(self) -> None:
        """Start to log; not before the command is known to be one that may continue the study."""
        for thread in self._threads.values():
            thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the trackers, but not for longer than FLUSH_S; not at all after an error."""
        self._stopping.set()
        deadline = time.monotonic() + FLUSH_S
        for name, thread in self._threads.items() if kind is None else ():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _warn(name, f"it is not done after {FLUSH_S:.0f} s")

    def add_model(self, result: dict[str, Any]) -> None:
        """Log the study's result (see results.find_result) at the end of the block."""
        self._model = describe_model(self._member, self._options.output, result)

    def _run(self, name: str) -> None:
        """Log to one tracker until the end of the block; in a thread."""
        tracker: Tracker | None = None
        logged: set[str] = set()
        warned = stopping = False
        while not stopping:
            stopping = self._stopping.wait(POLL_INTERVAL_S)
            try:
                tracker = tracker or TRACKERS[name].tracker(self._options.artifacts)
                for entry in self._find_entries(stopping):
                    if entry.id not in logged:
                        tracker.log(entry)
                        logged.add(entry.id)
            except Exception as error:  # noqa: BLE001 - a tracker may raise anything
                if not warned:
                    _warn(name, first_line(error))
                warned = True

    def _find_entries(self, stopping: bool) -> list[Entry]:
        trials = self._member.run_locked(lambda study: find_trials(study, self._member.id))
        entries = [describe_trial(self._member, trial) for trial in trials]
        model = self._model if stopping else None
        if model and self._member.become_leader():  # other members leave the model to the leader
            entries.append(model)
        return entries


def _warn(name: str, reason: str) -> None:
    text = "the search is not affected; the same command logs what is missing"
    log.warning("--track %s: %s; %s", name, mask_text(reason), text)


def find_trials(study: optuna.Study, member_id: str) -> list[FrozenTrial]:
    """The finished trials that a member logs: its own, and the first member those of no member."""
    members = study.user_attrs.get("members", {})
    is_first = member_id == min(members, default=None)
    owners = [
        (trial, trial.user_attrs.get("run", {}).get("by"))
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished()
    ]
    return [
        trial
        for trial, owner in owners
        if owner == member_id or (is_first and owner not in members)
    ]


def describe_trial(member: Member, trial: FrozenTrial) -> Entry:
    start, end = trial.datetime_start, trial.datetime_complete
    end = end or datetime.datetime.now()
    return Entry(
        member.name,
        member.study_id,
        f"trial {trial.number}",
        trial.state.name.lower(),
        trial.params,
        {} if trial.value is None else {"accuracy": trial.value},
        start or end,
        end,
        trial.intermediate_values,
    )


def describe_model(member: Member, registry_folder: Path, result: dict[str, Any]) -> Entry:
    """The final model, with its files where this machine's registry has them."""
    created = datetime.datetime.fromisoformat(result["created"])
    files = (registry_folder / Path(part["file"]).name for part in result["files"].values())
    metrics = {
        f"{split}_{name}": value
        for split, values in result["metrics"].items()
        for name, value in values.items()
        if isinstance(value, int | float)
    }
    return Entry(
        member.name,
        member.study_id,
        f"model {result['name']}",
        "complete",
        result["hyperparameters"],
        metrics,
        created,
        created,
        files=tuple(path for path in files if path.exists()),
        record=result,
    )
