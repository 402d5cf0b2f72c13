"""The Optuna study: sampler, pruner, fingerprint, best trials, baselines, confirmations."""

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist.data import FOLDER_PREFIX, Dataset
from mnist.search import budget
from mnist.search.runs import derive_seed
from mnist.search.space import DEFAULT, Space, filter_params
from mnist.search.storage import StudyError

FIRST_PARAMS = {"batch_size": 33, "optimizer": "Adam", "lr": 0.00039}  # the published best
BASELINES = ("first", "median")
CONFIRM_SEEDS = 2  # fresh seeds, on which the best trials and the baselines are trained again
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def fingerprint(
    dataset: Dataset,
    network: str,
    trial_samples: int,
    space: Space = DEFAULT,
    plain: bool = False,
) -> dict[str, Any]:
    """The properties that all trials of a study share, as only such trials can be compared."""
    is_folder = dataset.name.startswith(FOLDER_PREFIX)  # whose classes may be renamed alone
    optional = {"classes": ", ".join(dataset.classes)} if is_folder else {}
    if dataset.kind != "digit":  # studies of the time before kinds trained as for digits
        optional["augmentation"] = dataset.kind
    return optional | {
        "data": dataset.sha256[:16],
        "split": dataset.split_sha256[:16],
        "validation images": len(dataset.validation),
        "network": network,
        "layers": "plain" if plain else "in their training form",
        "space": {key: str(value) for key, value in space.items()},
        "images a trial": trial_samples,
    }


def check_fingerprint(study: optuna.Study, current: dict[str, Any], finished: bool = False) -> None:
    """Store the fingerprint of a new study; raise StudyError where an existing one differs.

    A `finished` study trains nothing more, so it may lack what older versions did not record.
    """
    recorded = study.user_attrs.get("fingerprint")
    if recorded is None:
        if study.get_trials(deepcopy=False):
            raise StudyError(
                f"study {study.study_name} was not made by this command; name another with --study"
            )
        study.set_user_attr("fingerprint", current)
        return
    older = {"layers": "plain", "augmentation": "digit"}
    recorded = {key: current.get(key) if finished else older[key] for key in older} | recorded
    differences = [
        _describe_difference(key, value, recorded.get(key))
        for key, value in current.items()
        if recorded.get(key) != value
    ]
    if differences:
        raise StudyError(
            f"study {study.study_name} cannot be continued by this command "
            f"({'; '.join(differences)}); start another one with --study {study.study_name}-2"
        )


def _describe_difference(key: str, requested: Any, recorded: Any) -> str:
    if key == "data":
        return "its images differ: another folder, --image-size, --color or --train-samples"
    if isinstance(requested, dict):  # the space
        recorded = recorded or {}
        triples = [(name, requested.get(name), recorded.get(name)) for name in requested | recorded]
        parts = (f"{name} {new}, in the study {old}" for name, new, old in triples if new != old)
        return f"{key} is {'; '.join(parts)}"
    return f"{key} is {requested}, in the study {recorded}"


def make_pruner(trial_samples: int) -> optuna.pruners.BasePruner:
    """Successive halving (Li et al. 2020, arXiv 1810.05934), with images as the resource."""
    return optuna.pruners.SuccessiveHalvingPruner(
        budget.rungs(trial_samples)[0], budget.REDUCTION_FACTOR
    )


class _KnownSpaceTPESampler(optuna.samplers.TPESampler):
    """TPE with a given search space. Optuna's infers it from all trials, which takes 47 of 460 ms
    per trial in a study of 10,000."""

    def __init__(self, seed: int, space: Space) -> None:
        super().__init__(seed=seed)
        self._known_space = {
            name: distribution
            for name, distribution in sorted(space.items())
            if not distribution.single()
        }

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return self._known_space


SAMPLERS: dict[str, Callable[[int, Space], optuna.samplers.BaseSampler]] = {
    "tpe": _KnownSpaceTPESampler,
    "random": lambda seed, _: optuna.samplers.RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "halving": make_pruner,
    "none": lambda trial_samples: optuna.pruners.NopPruner(),
}


def ask(
    study: optuna.Study,
    seed: int,
    sampler: str = "tpe",
    existing: list[FrozenTrial] | None = None,
    space: Space = DEFAULT,
) -> optuna.Trial:
    """The trial that has been waiting longest, or a new one; its state becomes RUNNING.

    The sampler's seed follows from the trial's number, so an interrupted study asks for the same
    trials as an uninterrupted one. `existing`: all trials, if the caller has them.
    """
    existing = study.get_trials(deepcopy=False) if existing is None else existing
    if not existing and (first := filter_params(space, FIRST_PARAMS)):
        study.enqueue_trial(first)
    waiting = (trial.number for trial in existing if trial.state == TrialState.WAITING)
    study.sampler = SAMPLERS[sampler](derive_seed(seed, next(waiting, len(existing))), space)
    return study.ask(space)


def count_finished(study: optuna.Study) -> int:
    """The number of COMPLETE and PRUNED trials, which --trials counts."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def best_trials(study: optuna.Study, k: int) -> list[FrozenTrial]:
    """The k complete trials with the best validation accuracy; of equals, the earlier first.

    Excluded trials are left out.
    """
    excluded = study.user_attrs.get("set_aside", {})
    complete = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if str(trial.number) not in excluded
    ]
    return sorted(complete, key=lambda trial: (-_get_value(trial), trial.number))[:k]


def _get_value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def exclude_trial(study: optuna.Study, number: int, reason: str) -> None:
    """Exclude a complete trial from now on; the study stores the reason."""
    excluded = study.user_attrs.get("set_aside", {})
    study.set_user_attr("set_aside", excluded | {str(number): reason})


def confirmations(study: optuna.Study, number: int) -> list[float]:
    """Validation accuracies of the trial's hyperparameters on fresh seeds, as far as known.

    The best of many trials is also a lucky one; these accuracies have no part in its selection.
    """
    return list(study.user_attrs.get("confirmations", {}).get(str(number), {}).values())


def record_confirmation(study: optuna.Study, number: int, seed: int, accuracy: float) -> None:
    """Store the accuracy of one run on a fresh seed, which does not count as a trial."""
    confirmed = study.user_attrs.get("confirmations", {})
    accuracies = confirmed.get(str(number), {}) | {str(seed): accuracy}
    study.set_user_attr("confirmations", confirmed | {str(number): accuracies})


def select_baselines(study: optuna.Study) -> dict[str, FrozenTrial]:
    """Finished trials to compare the winner with: the `first`, and the `median` by first report."""
    reported = [
        trial
        for trial in study.get_trials(deepcopy=False, states=FINISHED)
        if trial.intermediate_values
    ]
    if not reported:
        return {}
    ranked = sorted(reported, key=lambda t: t.intermediate_values[min(t.intermediate_values)])
    return dict(zip(BASELINES, (reported[0], ranked[len(ranked) // 2]), strict=True))


def find_unconfirmed(study: optuna.Study, k: int) -> list[tuple[FrozenTrial, list[int]]]:
    """Trials that lack confirmations, with the missing seeds (0, 1, …): of the k best trials and,
    for k > 0, of the baselines."""
    confirmed, excluded = (study.user_attrs.get(key, {}) for key in ("confirmations", "set_aside"))
    trials = {trial.number: trial for trial in best_trials(study, k)}
    if trials:
        trials |= {trial.number: trial for trial in select_baselines(study).values()}
    missing = [
        (trial, [i for i in range(CONFIRM_SEEDS) if str(i) not in confirmed.get(str(number), {})])
        for number, trial in trials.items()
        if str(number) not in excluded
    ]
    return [(trial, seeds) for trial, seeds in missing if seeds]


def gain_over_baselines(study: optuna.Study, winner: int) -> dict[str, dict[str, Any]]:
    """Accuracies on fresh seeds of the winner and of the baselines, by name.

    Each entry has `trial` and `accuracies`; without confirmations there is none.
    """
    numbers = {"winner": winner} | {key: t.number for key, t in select_baselines(study).items()}
    confirmed = {name: confirmations(study, number) for name, number in numbers.items()}
    return {
        name: {"trial": numbers[name], "accuracies": accuracies}
        for name, accuracies in confirmed.items()
        if len(accuracies) == CONFIRM_SEEDS
    }


def mean_confirmations(study: optuna.Study, k: int) -> dict[int, float]:
    """Mean accuracies on fresh seeds of the k best trials, by number."""
    confirmed = {t.number: confirmations(study, t.number) for t in best_trials(study, k)}
    return {number: sum(values) / len(values) for number, values in confirmed.items() if values}


def skip_confirmations(study: optuna.Study) -> None:
    """Let select_winner() do without missing confirmations until another trial is finished."""
    study.set_user_attr("confirmations_skipped", count_finished(study))


def select_winner(study: optuna.Study, k: int) -> FrozenTrial | None:
    """Of the k best trials the one with the best mean on fresh seeds; for k = 0, and where missing
    confirmations are skipped, the trial with the best accuracy.

    None without a complete trial, or while confirmations are missing.
    """
    if find_unconfirmed(study, k):
        if study.user_attrs.get("confirmations_skipped") != count_finished(study):
            return None
        k = 0
    best = best_trials(study, max(1, k))

    def mean(trial: FrozenTrial) -> float:
        values: Sequence[float] = confirmations(study, trial.number) if k else [_get_value(trial)]
        return sum(values) / len(values)

    return max(best, key=mean, default=None)  # of equals the better trial, which comes first


def final_samples(study: optuna.Study, number: int) -> int | None:
    """The images of the final training with the hyperparameters of this trial, if it has begun."""
    return study.user_attrs.get("final_samples", {}).get(str(number))


def store_final_samples(study: optuna.Study, number: int, samples: int) -> None:
    stored = study.user_attrs.get("final_samples", {})
    study.set_user_attr("final_samples", stored | {str(number): samples})


def micro_batch(trial: FrozenTrial) -> int | None:
    """The trial's micro-batch at its end; None where its memory was enough for whole batches."""
    return trial.user_attrs.get("again", {}).get("micro_batch")
