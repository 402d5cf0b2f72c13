"""The study: its search space, sampler, pruner, objective, and how it goes on after a stop."""

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
import torch
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from mnist import models, training
from mnist.data import Dataset

SPACE: dict[str, BaseDistribution] = {
    "batch_size": IntDistribution(32, 256, log=True),
    "optimizer": CategoricalDistribution(training.OPTIMIZERS),
    "lr": FloatDistribution(1e-5, 1e-1, log=True),
}
FIRST = {"batch_size": 33, "optimizer": "Adam", "lr": 0.00039}  # the published best
RUNGS = (1 / 6, 1 / 2)  # shares of a trial's images after which it is compared and may be pruned
REDUCTION = 3  # about one trial in so many survives a rung
FAILURES = 5  # failed trials in a row that end a search
IMPORTANCE_FROM = 10  # complete trials, below which an importance would be noise
SEARCH_SHARE = 0.33  # of the time; the rest is the final model's
TRIAL_COST = (
    0.35  # of a trial's most images, seen on average: 1/6 + 1/3 * 1/3 + 1/9 * 1/2, and luck
)
LEAST_SAMPLES = 1000  # under which a trial shows nothing
MOST_FINAL_EPOCHS = 10
STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError)  # a full disk, a lost server
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class StudyError(RuntimeError):
    """A study that cannot be opened or continued with this command."""


class Unfinished(RuntimeError):
    """A search that stopped before its budget was reached; what finished is kept."""


@dataclass(frozen=True)
class Update:
    """What happens in a search: a trial goes on (`progress`) or ends (`state`, `value`)."""

    number: int
    params: dict[str, Any]
    progress: training.Progress | None = None
    state: TrialState | None = None
    value: float | None = None
    seconds: float = 0.0


def open_study(storage: str, name: str) -> optuna.Study:
    """Create or continue a study. Raises StudyError where the storage cannot be used."""
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid4().hex)
    except (*STORAGE_ERRORS, ImportError, ValueError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StudyError(
            f"--storage {without_password(storage)!r} cannot be opened: {reason}; "
            "a URL such as sqlite:///db.sqlite3 is wanted"
        ) from error
    return study


def without_password(storage: str) -> str:
    """The storage's URL as it may be shown and recorded."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return storage


@contextlib.contextmanager
def lock(storage: str, name: str) -> Iterator[None]:
    """Held by one process at a time on a study; the operating system frees it with the process.

    It is a file beside SQLite's; for a database server it holds off this machine's processes only.
    Raises StudyError where another process holds it.
    """
    place, folder = storage, Path(tempfile.gettempdir())
    if (database := _sqlite_file(storage)) is not None:
        place, folder = str(database), database.parent
    key = hashlib.sha256(f"{place} {name}".encode()).hexdigest()[:16]
    held = FileLock(folder / f".study-{key}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise StudyError(f"another process is working on study {name}; wait for it") from error
    except OSError as error:
        raise StudyError(f"cannot write to {folder}: {error.strerror}; see --storage") from error
    try:
        yield
    finally:
        held.release()


def _sqlite_file(storage: str) -> Path | None:
    """The database's file, where the storage is one."""
    try:
        url = make_url(storage)
    except SQLAlchemyError:
        return None
    file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).resolve() if file else None


def fingerprint(dataset: Dataset, network: str, trial_samples: int) -> dict[str, Any]:
    """What must be the same for two trials to be compared."""
    return {
        "data": dataset.sha256[:16],
        "split": dataset.cut[:16],
        "validation images": len(dataset.validation),
        "network": network,
        "space": {key: str(value) for key, value in SPACE.items()},
        "images a trial": trial_samples,
    }


def agree(study: optuna.Study, wanted: dict[str, Any]) -> None:
    """Keep the fingerprint of a new study; raise StudyError if an old one's differs."""
    kept = study.user_attrs.get("fingerprint")
    if kept is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name} was not made by this command; name another with --study"
            )
        study.set_user_attr("fingerprint", wanted)
        return
    different = [
        f"{key} is {value}, there {kept.get(key)}"
        for key, value in wanted.items()
        if kept.get(key) != value
    ]
    if different:
        raise StudyError(
            f"study {study.study_name} cannot be continued by this command "
            f"({'; '.join(different)}); start another one with --study {study.study_name}-2"
        )


def finished(study: optuna.Study) -> int:
    """Trials that are COMPLETE or PRUNED: what --trials counts."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial with the best validation accuracy, the earliest of equals.

    Without the trials that were set aside.
    """
    aside = study.user_attrs.get("set_aside", {})
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if str(trial.number) not in aside
    ]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def set_aside(study: optuna.Study, trial: FrozenTrial, reason: str) -> None:
    """Pass over a complete trial from now on; the reason stays with the study."""
    aside = study.user_attrs.get("set_aside", {})
    study.set_user_attr("set_aside", aside | {str(trial.number): reason})


def seed_of(seed: int, *numbers: int) -> int:
    """A seed (31 bits) that follows from the study's and a trial's number, say."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0] >> 1)


def release(study: optuna.Study) -> None:
    """Put back into the queue what a process that is gone left RUNNING; its number, parameters
    and seed stay, so that it gives what it would have given. For the holder of the lock only.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def search(
    study: optuna.Study,
    dataset: Dataset,
    network: str,
    *,
    trials: int,
    trial_samples: int,
    seed: int,
    device: torch.device,
    deadline: float = float("inf"),
) -> Generator[Update]:
    """Go on until `trials` trials are finished; yields what happens.

    Each trial trains on at most `trial_samples` images of the training split and is judged on the
    validation split. `deadline` is a time.monotonic() at which to stop early. Raises Unfinished
    after FAILURES failed trials in a row. However it ends, no trial is left RUNNING.
    """
    release(study)
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(FIRST)
    rungs = [max(1, int(RUNGS[0] * trial_samples)) * REDUCTION**i for i in range(len(RUNGS))]
    study.pruner = optuna.pruners.SuccessiveHalvingPruner(rungs[0], REDUCTION)
    failures = 0
    try:
        while finished(study) < trials:
            # A sampler seeded by the trial's number: a study that was stopped and continued asks
            # for the same trials as one that was not.
            past = study.get_trials(deepcopy=False)
            waiting = (trial.number for trial in past if trial.state == TrialState.WAITING)
            number = next(waiting, len(past))
            study.sampler = optuna.samplers.TPESampler(seed=seed_of(seed, number))
            trial = study.ask(SPACE)
            for update in _run(study, trial, dataset, network, rungs, trial_samples, seed, device):
                yield update
                if time.monotonic() > deadline:
                    return
            failures = failures + 1 if update.state == TrialState.FAIL else 0
            if failures == FAILURES:
                reason = study.trials[trial.number].user_attrs["fail_reason"]
                raise Unfinished(f"{FAILURES} trials in a row failed, the last because {reason}")
    finally:
        with contextlib.suppress(*STORAGE_ERRORS):  # nor does a broken connection hide why it ended
            release(study)


def _run(
    study: optuna.Study,
    trial: optuna.Trial,
    dataset: Dataset,
    network: str,
    rungs: list[int],
    samples: int,
    seed: int,
    device: torch.device,
) -> Iterator[Update]:
    """One trial: train, report, prune, tell; its last Update has the state."""
    number, params, start = trial.number, dict(trial.params), time.monotonic()
    torch.manual_seed(seed_of(seed, number))
    model = models.build(network, dataset.channels, dataset.size, len(dataset.classes)).to(device)
    state, value = TrialState.COMPLETE, None
    run = training.fit(
        model,
        dataset,
        dataset.train,
        dataset.validation,
        **params,
        samples=samples,
        validate_at=rungs,
        seed=seed_of(seed, number, 1),
    )
    try:
        for progress in run:
            yield Update(number, params, progress=progress)
            if progress.accuracy is None:
                continue
            value = progress.accuracy
            trial.report(value, progress.samples)
            if progress.samples < progress.total and trial.should_prune():
                state = TrialState.PRUNED
                break
    except (training.Diverged, RuntimeError, MemoryError) as error:  # torch's own: out of memory
        state, value = TrialState.FAIL, None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        trial.set_user_attr("fail_reason", lines[0])
    seconds = time.monotonic() - start
    trial.set_user_attr("seconds", round(seconds, 2))
    study.tell(trial, value if state == TrialState.COMPLETE else None, state)
    yield Update(number, params, state=state, value=value, seconds=seconds)


def importance(study: optuna.Study) -> dict[str, float] | None:
    """Each hyperparameter's share (0..1) of what moves the accuracy, by PED-ANOVA.

    None below IMPORTANCE_FROM complete trials.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < IMPORTANCE_FROM:
        return None
    return optuna.importance.get_param_importances(study)


@dataclass(frozen=True)
class Plan:
    """How a time is spent: the most images a trial sees, seconds expected for each trial and for
    the final model, and the training images a second that this rests on."""

    trial_samples: int
    trial_s: float
    final_s: float
    images_per_s: float


def plan(
    dataset: Dataset,
    trials: int,
    images_per_s: float,
    total_s: float,
    trial_samples: int | None = None,
) -> Plan:
    """Spend about `total_s`, SEARCH_SHARE of it on the search, at `images_per_s` in training.

    By the rungs above a trial costs TRIAL_COST of its most images on average, and forward passes,
    a third of a training step each, over validation images. A faster machine gets longer trials,
    up to a pass over the training split; then it is simply done sooner.
    """
    complete = 1 / REDUCTION ** len(RUNGS)
    checks = training.SUBSET * (1 + 1 / REDUCTION) + len(dataset.validation) * complete
    if trial_samples is None:
        room = total_s * SEARCH_SHARE * images_per_s / trials - checks / 3
        trial_samples = int(min(max(room / TRIAL_COST, LEAST_SAMPLES), len(dataset.train)))
    trial_s = (trial_samples * TRIAL_COST + checks / 3) / images_per_s
    most_s = MOST_FINAL_EPOCHS * (len(dataset.train) + len(dataset.validation)) / images_per_s
    return Plan(trial_samples, trial_s, min(total_s * (1 - SEARCH_SHARE), most_s), images_per_s)


def summary(study: optuna.Study) -> dict[str, Any]:
    """How the study went, as JSON values: counts by state, best and first trial, importance."""
    trials = study.get_trials(deepcopy=False)
    counts = {
        state.name.lower(): sum(trial.state == state for trial in trials)
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    return {
        "trials": counts,
        "best": _brief(best_trial(study)),
        "first": _brief(next((t for t in trials if t.state in FINISHED), None)),
        "importance": importance(study),
    }


def _brief(trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {
        "number": trial.number,
        "params": trial.params,
        "state": trial.state.name.lower(),
        "accuracy": trial.value,
    }
