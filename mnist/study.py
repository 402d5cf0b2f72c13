"""The study and its record: space, sampler, pruner, fingerprint, best trial, summary."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from mnist import budget
from mnist.data import FOLDER, Dataset
from mnist.space import DEFAULT, Space, inside

FIRST = {"batch_size": 33, "optimizer": "Adam", "lr": 0.00039}  # the published best
IMPORTANCE_FROM = 10  # complete trials, below which an importance would be noise
YARDSTICKS = ("first", "median")
CONFIRM_SEEDS = 2  # fresh ones, on which the best trials and the yardsticks are run again
BUSY_S = 60  # how long SQLite waits for another process's statement
# After which PostgreSQL ends a transaction that does nothing, or waits for a lock; less than
# members.GRACE_PERIOD_S, so that a trial is free before another member takes it.
STALL_S = 30.0
STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError)  # a full disk, a lost server
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class StudyError(RuntimeError):
    """A study that cannot be opened or continued with this command."""


def open_study(storage: str, name: str) -> optuna.Study:
    """Create or continue a study. Raises StudyError where the storage cannot be used."""
    try:
        database = optuna.storages.RDBStorage(storage, engine_kwargs(storage))
        study = optuna.create_study(
            storage=database, study_name=name, direction="maximize", load_if_exists=True
        )
        if "id" not in study.user_attrs:
            study.set_user_attr("id", uuid4().hex)
    except (*STORAGE_ERRORS, ImportError, ValueError) as error:
        raise unusable(storage, str(getattr(error, "orig", None) or error)) from error
    return study


def without_password(storage: str) -> str:
    """The storage's URL as it may be shown and recorded."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return storage


def engine_kwargs(storage: str) -> dict[str, Any]:
    """What SQLAlchemy's engine needs for that kind of database; raises StudyError for no URL."""
    try:
        kind = make_url(storage).get_backend_name()
    except SQLAlchemyError as error:
        raise unusable(storage, str(error)) from error
    if kind == "sqlite":
        return {"connect_args": {"timeout": BUSY_S}}
    if kind == "postgresql":  # so that a server that hangs is noticed: libpq's parameters
        seconds = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5}
        rest = {"keepalives_count": 3, "tcp_user_timeout": 30_000}
        events = [(limit, "connect")]
        return {"pool_pre_ping": True, "connect_args": seconds | rest, "pool_events": events}
    return {"pool_pre_ping": True}


def limit(connection: Any, _: Any) -> None:
    """Have PostgreSQL end transactions of this new connection that stall for STALL_S: a process
    stopped in one would keep its locks, and others waiting, for as long as its machine sleeps."""
    with connection.cursor() as cursor:
        for name in ("idle_in_transaction_session_timeout", "lock_timeout"):
            cursor.execute(f"SET {name} = {int(STALL_S * 1000)}")
    connection.commit()


def unusable(storage: str, reason: str) -> StudyError:
    """The error for a storage that cannot be opened, in one line."""
    return StudyError(
        f"--storage {without_password(storage)!r} cannot be opened: "
        f"{reason.strip().splitlines()[0]}; a URL such as sqlite:///db.sqlite3 is wanted"
    )


def sqlite_file(storage: str) -> Path | None:
    """The database's file, where the storage is one."""
    try:
        url = make_url(storage)
    except SQLAlchemyError:
        return None
    file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)).resolve() if file else None


def fingerprint(
    dataset: Dataset,
    network: str,
    trial_samples: int,
    space: Space = DEFAULT,
    plain: bool = False,
) -> dict[str, Any]:
    """What must be the same for two trials to be compared."""
    named = dataset.name.startswith(FOLDER)  # where a class can be renamed, its pictures unchanged
    return ({"classes": ", ".join(dataset.classes)} if named else {}) | {
        "data": dataset.sha256[:16],
        "split": dataset.cut[:16],
        "validation images": len(dataset.validation),
        "network": network,
        "layers": "plain" if plain else "in their training form",
        "space": {key: str(value) for key, value in space.items()},
        "images a trial": trial_samples,
    }


def agree(study: optuna.Study, wanted: dict[str, Any], finished: bool = False) -> None:
    """Keep the fingerprint of a new study; raise StudyError if an existing study's differs.

    A `finished` study trains nothing more, so one without "layers" is accepted: it was made before
    training forms existed.
    """
    kept = study.user_attrs.get("fingerprint")
    if kept is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name} was not made by this command; name another with --study"
            )
        study.set_user_attr("fingerprint", wanted)
        return
    kept = {"layers": wanted["layers"] if finished else "plain"} | kept
    different = [
        _differing(key, value, kept.get(key))
        for key, value in wanted.items()
        if kept.get(key) != value
    ]
    if different:
        raise StudyError(
            f"study {study.study_name} cannot be continued by this command "
            f"({'; '.join(different)}); start another one with --study {study.study_name}-2"
        )


def _differing(key: str, value: Any, there: Any) -> str:
    if key == "data":
        return "it has other images: of another folder, --image-size, --color or --train-samples"
    if isinstance(value, dict):  # the space
        there = there or {}
        entries = [each for each in {**value, **there} if value.get(each) != there.get(each)]
        parts = (f"{each} {value.get(each)}, there {there.get(each)}" for each in entries)
        return f"{key} is {'; '.join(parts)}"
    return f"{key} is {value}, there {there}"


def pruner(trial_samples: int) -> optuna.pruners.BasePruner:
    """Successive halving (Li et al. 2020, arXiv 1810.05934) in images seen, whatever the batch."""
    return optuna.pruners.SuccessiveHalvingPruner(budget.rungs(trial_samples)[0], budget.REDUCTION)


class _Tpe(optuna.samplers.TPESampler):
    """TPE that is told the space, where Optuna's goes through all trials to find what they share:
    47 of 460 ms for a trial in a study of 10,000."""

    def __init__(self, seed: int, space: Space) -> None:
        super().__init__(seed=seed)
        self._told = {name: each for name, each in sorted(space.items()) if not each.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return self._told


SAMPLERS: dict[str, Callable[[int, Space], optuna.samplers.BaseSampler]] = {
    "tpe": _Tpe,
    "random": lambda seed, _: optuna.samplers.RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "halving": pruner,
    "none": lambda trial_samples: optuna.pruners.NopPruner(),
}


def ask(
    study: optuna.Study,
    seed: int,
    sampler: str = "tpe",
    past: list[FrozenTrial] | None = None,
    space: Space = DEFAULT,
) -> optuna.Trial:
    """The trial that waits longest, or a new one; it is RUNNING then.

    The sampler is seeded by the trial's number: a study that was stopped and continued asks for
    the same trials as one that was not. `past` are all its trials, where the caller has them.
    """
    past = study.get_trials(deepcopy=False) if past is None else past
    if not past and (first := inside(space, FIRST)):
        study.enqueue_trial(first)
    waiting = (trial.number for trial in past if trial.state == TrialState.WAITING)
    study.sampler = SAMPLERS[sampler](seed_of(seed, next(waiting, len(past))), space)
    return study.ask(space)


def finished(study: optuna.Study) -> int:
    """Trials that are COMPLETE or PRUNED: what --trials counts."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def best_trials(study: optuna.Study, k: int) -> list[FrozenTrial]:
    """The k complete trials with the best validation accuracy, the earlier of equals first.

    Without the trials that were set aside.
    """
    aside = study.user_attrs.get("set_aside", {})
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if str(trial.number) not in aside
    ]
    return sorted(complete, key=lambda trial: (-_value(trial), trial.number))[:k]


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def set_aside(study: optuna.Study, number: int, reason: str) -> None:
    """Pass over a complete trial from now on; the reason stays with the study."""
    aside = study.user_attrs.get("set_aside", {})
    study.set_user_attr("set_aside", aside | {str(number): reason})


def confirmations(study: optuna.Study, number: int) -> list[float]:
    """Validation accuracies of the trial's hyperparameters on fresh seeds, as far as they are in.

    The best of many trials is the luckiest too; these have no part in its choice.
    """
    return list(study.user_attrs.get("confirmations", {}).get(str(number), {}).values())


def confirm(study: optuna.Study, number: int, seed: int, accuracy: float) -> None:
    """Keep the accuracy of one run on a fresh seed; it does not count as a trial."""
    kept = study.user_attrs.get("confirmations", {})
    own = kept.get(str(number), {}) | {str(seed): accuracy}
    study.set_user_attr("confirmations", kept | {str(number): own})


def yardsticks(study: optuna.Study) -> dict[str, FrozenTrial]:
    """The finished trials beside which the winner shows what the search was worth: the `first` one,
    and the `median` one by its first report."""
    reported = [
        trial
        for trial in study.get_trials(deepcopy=False, states=FINISHED)
        if trial.intermediate_values
    ]
    if not reported:
        return {}
    ranked = sorted(reported, key=lambda t: t.intermediate_values[min(t.intermediate_values)])
    return dict(zip(YARDSTICKS, (reported[0], ranked[len(ranked) // 2]), strict=True))


def unconfirmed(study: optuna.Study, k: int) -> list[tuple[FrozenTrial, list[int]]]:
    """Those of the k best trials, and of the yardsticks if k > 0, that lack confirmations, and the
    seeds (0, 1, …) they lack."""
    kept, aside = (study.user_attrs.get(key, {}) for key in ("confirmations", "set_aside"))
    wanted = {trial.number: trial for trial in best_trials(study, k)}
    if wanted:
        wanted |= {trial.number: trial for trial in yardsticks(study).values()}
    lacking = [
        (trial, [i for i in range(CONFIRM_SEEDS) if str(i) not in kept.get(str(number), {})])
        for number, trial in wanted.items()
        if str(number) not in aside
    ]
    return [(trial, seeds) for trial, seeds in lacking if seeds]


def worth(study: optuna.Study, winner: int) -> dict[str, dict[str, Any]]:
    """What the search was worth: accuracies on fresh seeds of the winner and of the yardsticks.

    By name: `trial` and `accuracies`; empty where nothing was confirmed.
    """
    numbers = {"winner": winner} | {key: t.number for key, t in yardsticks(study).items()}
    confirmed = {name: confirmations(study, number) for name, number in numbers.items()}
    return {
        name: {"trial": numbers[name], "accuracies": accuracies}
        for name, accuracies in confirmed.items()
        if len(accuracies) == CONFIRM_SEEDS
    }


def means(study: optuna.Study, k: int) -> dict[int, float]:
    """Mean accuracies on fresh seeds of the k best trials, by their numbers."""
    found = {trial.number: confirmations(study, trial.number) for trial in best_trials(study, k)}
    return {number: sum(values) / len(values) for number, values in found.items() if values}


def winner(study: optuna.Study, k: int) -> FrozenTrial | None:
    """Of the k best trials the one with the best mean on fresh seeds; with k = 0 the best trial.

    None where there is no complete trial, or the confirmations are not all in.
    """
    best = best_trials(study, max(1, k))
    if unconfirmed(study, k):
        return None

    def mean(trial: FrozenTrial) -> float:
        values: Sequence[float] = confirmations(study, trial.number) if k else [_value(trial)]
        return sum(values) / len(values)

    return max(best, key=mean, default=None)  # the first of equals is the better trial


def micro_batch(trial: FrozenTrial) -> int | None:
    """With which it was trained in the end, where its memory was too small for whole batches."""
    return trial.user_attrs.get("again", {}).get("micro_batch")


def seed_of(seed: int, *numbers: int) -> int:
    """A seed (31 bits) that follows from the study's and a trial's number, say."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1)[0] >> 1)


def importance(study: optuna.Study) -> dict[str, float] | None:
    """Each hyperparameter's share (0..1) of what moves the accuracy, by PED-ANOVA.

    None below IMPORTANCE_FROM complete trials.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < IMPORTANCE_FROM:
        return None
    return optuna.importance.get_param_importances(study)


def summary(study: optuna.Study, best: int) -> dict[str, Any]:
    """How the study went, as JSON values: counts by state, the trial whose number is `best`, the
    first one, importance, and why trials failed, by their numbers."""
    trials = study.get_trials(deepcopy=False)
    counts = {
        state.name.lower(): sum(trial.state == state for trial in trials)
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    return {
        "trials": counts,
        "best": _brief(trials[best]),
        "first": _brief(next((t for t in trials if t.state in FINISHED), None)),
        "importance": importance(study),
        "failures": {
            str(trial.number): trial.user_attrs.get("fail_reason", "unknown")
            for trial in trials
            if trial.state == TrialState.FAIL
        },
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
