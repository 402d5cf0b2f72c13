"""A study as JSON values, and the importance of its hyperparameters."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist.search.study import FINISHED

MIN_TRIALS_FOR_IMPORTANCE = 10  # complete trials; with fewer, importances are noise


def compute_importance(study: optuna.Study) -> dict[str, float] | None:
    """The importance of each hyperparameter for the accuracy, as shares (0..1), by PED-ANOVA.

    None below MIN_TRIALS_FOR_IMPORTANCE complete trials, or if the worst is among the best tenth.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    values = sorted(trial.value or 0.0 for trial in complete)
    skip = len(values) < MIN_TRIALS_FOR_IMPORTANCE or values[0] == values[-1 - len(values) // 10]
    return None if skip else optuna.importance.get_param_importances(study)


def summarise(study: optuna.Study, best: int) -> dict[str, Any]:
    """The study as JSON values: counts by state, trial number `best`, the first trial, importance,
    and the reasons of failed trials by number."""
    trials = study.get_trials(deepcopy=False)
    counts = {
        state.name.lower(): sum(trial.state == state for trial in trials)
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    return {
        "trials": counts,
        "best": _summarise_trial(trials[best]),
        "first": _summarise_trial(next((t for t in trials if t.state in FINISHED), None)),
        "importance": compute_importance(study),
        "failures": {
            str(trial.number): trial.user_attrs.get("fail_reason", "unknown")
            for trial in trials
            if trial.state == TrialState.FAIL
        },
    }


def _summarise_trial(trial: FrozenTrial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    return {
        "number": trial.number,
        "params": trial.params,
        "state": trial.state.name.lower(),
        "accuracy": trial.value,
    }
