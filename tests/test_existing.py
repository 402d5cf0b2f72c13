"""mnist.search.existing: studies and trials that others have made."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from mnist.search import existing
from mnist.search import study as studies
from mnist.search.members import Member
from mnist.search.space import DEFAULT
from mnist.search.storage import StudyError, open_study


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/db.sqlite3"


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "maximize"]])
@pytest.mark.parametrize("has_trial", [False, True])
def test_a_study_that_does_not_maximize_one_value_is_refused_in_one_line(
    url: str, directions: list[str], has_trial: bool
) -> None:
    foreign = optuna.create_study(storage=url, study_name="foreign", directions=directions)
    if has_trial:
        foreign.tell(foreign.ask(), [0.5] * len(directions))
    words = f"study foreign has the direction {' and '.join(directions)}"
    with pytest.raises(StudyError, match=words) as why:
        Member(url, "foreign", threads=1)
    assert "start another one with --study foreign-2" in str(why.value)
    assert foreign.user_attrs == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("id", 7), ("members", []), ("plan", {"trials": 3}), ("plan", "short"), ("fingerprint", "x")],
)
def test_a_study_with_attributes_that_cannot_be_read_is_refused_in_one_line(
    url: str, key: str, value: Any
) -> None:
    study = optuna.create_study(storage=url, study_name="study", direction="maximize")
    study.set_user_attr(key, value)
    with pytest.raises(StudyError, match=f"attribute '{key}' that this command did not write"):
        open_study(url, "study")


def test_attributes_of_others_are_left_alone(url: str) -> None:
    study = open_study(url, "study")
    study.set_user_attr("contributors", ["me"])
    study.set_user_attr("plan", {"trial_samples": 1, "trial_s": 1, "final_s": 1, "images_per_s": 1})
    existing.check(study)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"optimizer": "AdamW"}, "space: optimizer 'AdamW' is not in Categorical"),
        ({"lr": "high"}, "space: lr 'high' is not in Float"),
        ({"lr": 5.0}, "space: lr 5.0 is not in Float"),
        ({"batch_size": 64.5}, "space: batch_size 64.5 is not in Int"),
        ({"batch_size": None}, "space: batch_size None is not in Int"),
        ({"momentum": 0.9}, "space: momentum is not in the space, which has batch_size"),
    ],
)
def test_an_enqueued_trial_outside_the_space_fails_and_the_study_continues(
    url: str, params: dict[str, Any], reason: str
) -> None:
    with Member(url, "study", threads=1) as member:
        first = member.trials.ask(9, seed=0)
        member.study.enqueue_trial(params)
        member.study.enqueue_trial({"lr": 0.01})
        second = member.trials.ask(9, seed=0)
        assert first is not None
        assert second is not None
        assert (second.number, second.params["lr"]) == (2, 0.01)
        assert {*second.params} == {*DEFAULT}
        rejected = member.study.trials[1]
        assert rejected.state == TrialState.FAIL
        assert rejected.user_attrs["fail_reason"].startswith(reason)


def test_a_trial_of_another_search_is_refused(url: str) -> None:
    study = open_study(url, "study")
    study.tell(studies.ask(study, seed=0), 0.9)
    existing.check_trials(study, DEFAULT)
    study.add_trial(create_trial(value=0.99))
    with pytest.raises(StudyError, match="trial 1 belongs to another search, with nothing; start"):
        existing.check_trials(study, DEFAULT)
