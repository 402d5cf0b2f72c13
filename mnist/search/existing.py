"""Studies and trials that other programs may have made: which of them the command continues."""

from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mnist.search.budget import Plan
from mnist.search.space import Space, describe_outside
from mnist.search.urls import StudyError

# The attributes of a study that the command reads, with their JSON types.
ATTRIBUTES = {
    **dict.fromkeys(("id", "finisher"), str),
    **dict.fromkeys(("members", "plan", "fingerprint", "origin", "result", "time"), dict),
    **dict.fromkeys(("confirmations", "set_aside", "final_samples"), dict),
    "confirmations_skipped": int,
    "reports": list,
}


def check(study: optuna.Study) -> None:
    """Raise StudyError unless the study maximizes one value and its attributes can be read."""
    name, directions = study.study_name, study.directions
    remedy = f"start another one with --study {name}-2"
    if directions != [StudyDirection.MAXIMIZE]:
        goals = " and ".join(direction.name.lower() for direction in directions)
        raise StudyError(
            f"study {name} has the direction {goals}; this command maximizes one value, the "
            f"accuracy; {remedy}"
        )
    for key, value in study.user_attrs.items():
        is_readable = _is_plan(value) if key == "plan" else True
        if not isinstance(value, ATTRIBUTES.get(key, object)) or not is_readable:
            text = f"study {name} has an attribute {key!r} that this command did not write"
            raise StudyError(f"{text}; {remedy}")


def check_trials(study: optuna.Study, space: Space) -> None:
    """Raise StudyError for a finished trial with other hyperparameters than those of the space.

    Another program has added such a trial, and no final model could be trained with its values.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        if {*trial.params} != {*space}:
            names = ", ".join(trial.params) or "nothing"
            raise StudyError(
                f"study {study.study_name}: trial {trial.number} belongs to another search, with "
                f"{names}; start another one with --study {study.study_name}-2"
            )


def reject_trials(study: optuna.Study, trials: list[FrozenTrial], space: Space) -> bool:
    """Set WAITING trials, which anybody may enqueue, to FAIL if they lie outside the space.

    Returns whether a trial was rejected. Called under the study's lock.
    """
    rejected = False
    for trial in trials:
        params = trial.params | trial.system_attrs.get("fixed_params", {})
        if trial.state == TrialState.WAITING and (reason := describe_outside(space, params)):
            study._storage.set_trial_user_attr(trial._trial_id, "fail_reason", f"space: {reason}")
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            rejected = True
    return rejected


def _is_plan(value: Any) -> bool:
    try:
        plan = Plan(**value)
    except TypeError:  # no dictionary, or one with other keys
        return False
    return all(isinstance(number, int | float) for number in vars(plan).values())
