"""mnist.search.claims: who owns a trial, and what an owner may do with it; without processes."""

from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from mnist.search import budget
from mnist.search import study as studies
from mnist.search.claims import Claim, ClaimLost, Trials
from mnist.search.storage import SharedStudy

SAMPLES = 600


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all studies, as its tables take the longest."""
    return f"sqlite:///{tmp_path_factory.mktemp('claims')}/db.sqlite3"


@pytest.fixture
def shared(storage: str, request: pytest.FixtureRequest) -> SharedStudy:
    shared = SharedStudy(storage, request.node.name)
    shared.study.pruner = studies.make_pruner(SAMPLES)
    return shared


def make_trials(shared: SharedStudy, name: str, threads: int = 2) -> Trials:
    """The trials as a member of this name sees them."""
    return Trials(shared, SimpleNamespace(id=name), threads)  # type: ignore[arg-type]


@pytest.fixture
def mine(shared: SharedStudy) -> Trials:
    return make_trials(shared, "me")


def ask(trials: Trials, n: int = 9, **options: Any) -> Claim:
    claim = trials.ask(n, 0, **options)
    assert claim is not None
    return claim


def states(shared: SharedStudy) -> list[str]:
    return [trial.state.name for trial in shared.study.trials]


def requeue_orphans(shared: SharedStudy, trials: Trials, *living: str) -> bool:
    entries = {name: {"beat": 1} for name in living} if living else None
    return trials.requeue_orphans(shared.study.get_trials(deepcopy=False), entries)


def test_a_claim_has_the_parameters_and_the_trial_has_its_owner(
    shared: SharedStudy, mine: Trials
) -> None:
    claim = ask(mine)
    trial = shared.study.trials[0]
    params = studies.FIRST_PARAMS
    assert claim == Claim(0, trial._trial_id, params, owner="me", threads=2, attrs={})
    assert (trial.state.name, trial.params) == ("RUNNING", params)
    assert trial.user_attrs["run"] == {"by": "me", "threads": 2}


def test_finished_and_running_trials_count_others_do_not(shared: SharedStudy, mine: Trials) -> None:
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        mine.tell(ask(mine), state, 0.5)
    mine.requeue(ask(mine))
    ask(mine, 3)
    assert states(shared) == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert mine.ask(3, 0) is None
    assert mine.ask(2, 0) is None
    assert ask(mine, 4).number == 4


def test_a_trial_is_drawn_by_the_seed_the_sampler_and_from_the_space(mine: Trials) -> None:
    space = {"lr": FloatDistribution(0.5, 1.0, log=True)}
    ask(mine)
    params = [
        ask(mine, space=space, sampler="random").params,
        ask(mine, space=space, sampler="random").params,
        mine.ask(9, seed=1, space=space, sampler="random").params,  # type: ignore[union-attr]
    ]
    assert all([*drawn] == ["lr"] and 0.5 <= drawn["lr"] <= 1 for drawn in params)
    assert len({drawn["lr"] for drawn in params}) == 3


def test_a_trial_that_is_run_again_keeps_its_attributes_and_threads(
    shared: SharedStudy, mine: Trials
) -> None:
    first = ask(mine)
    mine.requeue(first, again={"deaths": 1})
    assert states(shared) == ["WAITING"]
    other = make_trials(shared, "other", threads=7)
    again = ask(other)
    assert (again.number, again.params, again.threads) == (0, first.params, 2)
    assert again.owner == "other"
    assert again.attrs["again"] == {"deaths": 1}
    assert shared.study.trials[0].user_attrs["run"] == {"by": "other", "threads": 2}


@pytest.mark.parametrize("is_told", [False, True])
def test_a_trial_of_another_owner_cannot_be_changed(
    shared: SharedStudy, mine: Trials, is_told: bool
) -> None:
    claim = ask(mine)
    mine.requeue(claim)
    other = make_trials(shared, "other")
    theirs = ask(other)
    if is_told:
        other.tell(theirs, TrialState.COMPLETE, 0.9)
    for change in (
        lambda: mine.report(claim, 100, 0.1),
        lambda: mine.tell(claim, TrialState.COMPLETE, 0.1),
        lambda: mine.requeue(claim),
    ):
        with pytest.raises(ClaimLost, match="trial 0 was taken over"):
            change()
    trial = shared.study.trials[0]
    assert (trial.value, trial.intermediate_values) == (0.9 if is_told else None, {})


def test_a_trial_that_is_told_twice_ends_once(shared: SharedStudy, mine: Trials) -> None:
    claim = ask(mine)
    for _ in range(2):  # the first answer of the database was lost
        assert mine.tell(claim, TrialState.COMPLETE, 0.75, resumed=True) == 0.75
    trial = shared.study.trials[0]
    assert (trial.state.name, trial.value) == ("COMPLETE", 0.75)
    assert trial.user_attrs["resumed"] is True
    with pytest.raises(ClaimLost):
        mine.tell(claim, TrialState.FAIL)
    claim = ask(mine)
    mine.tell(claim, TrialState.FAIL, fail_reason="nan: so it is")
    trial = shared.study.trials[1]
    assert (trial.state.name, trial.value) == ("FAIL", None)
    assert trial.user_attrs["fail_reason"] == "nan: so it is"


def test_a_trial_that_is_requeued_twice_waits_once(shared: SharedStudy, mine: Trials) -> None:
    claim = ask(mine)
    for _ in range(2):
        mine.requeue(claim)
    assert states(shared) == ["WAITING"]


def test_a_pruned_trial_has_the_value_of_its_last_report(mine: Trials) -> None:
    claim = ask(mine)
    for samples, accuracy in ((100, 0.25), (200, 0.125)):
        mine.report(claim, samples, accuracy)
    assert mine.tell(claim, TrialState.PRUNED) == 0.125
    assert mine.tell(ask(mine), TrialState.PRUNED) is None  # before its first report


def test_a_complete_trial_has_its_own_value_whatever_was_reported(mine: Trials) -> None:
    claim = ask(mine)
    mine.report(claim, 100, 0.25)
    assert mine.tell(claim, TrialState.COMPLETE, 0.5) == 0.5


def test_a_report_is_stored_and_answered_by_the_pruner(shared: SharedStudy, mine: Trials) -> None:
    rung, pruned = budget.rungs(SAMPLES)[0], []
    for accuracy in (0.9, 0.8, 0.95):
        claim = ask(mine)
        assert not mine.report(claim, rung // 2, accuracy)
        pruned.append([mine.report(claim, rung, accuracy) for _ in range(2)])
    assert pruned == [[False, False], [True, True], [False, False]]
    trials = shared.study.trials
    assert [t.intermediate_values[rung] for t in trials] == [0.9, 0.8, 0.95]
    completed = [key for key in trials[1].system_attrs if key.startswith("completed_rung_")]
    assert len(completed) <= 1


@pytest.mark.parametrize(
    ("living", "state"), [(("me", "other"), "RUNNING"), (("me",), "WAITING"), ((), "RUNNING")]
)
def test_a_trial_of_a_dead_member_is_requeued(
    shared: SharedStudy, mine: Trials, living: tuple[str, ...], state: str
) -> None:
    ask(make_trials(shared, "other"))
    ask(mine)
    assert requeue_orphans(shared, mine, *living) == (state == "WAITING")
    assert states(shared) == [state, "RUNNING"]


def test_a_trial_without_an_owner_is_requeued_once_the_members_are_known(
    shared: SharedStudy, mine: Trials
) -> None:
    studies.ask(shared.study, 0)
    assert not requeue_orphans(shared, mine)
    assert requeue_orphans(shared, mine, "me")
    assert states(shared) == ["WAITING"]
    assert not requeue_orphans(shared, mine, "me")


def test_a_trial_of_this_member_without_a_claim_is_requeued(
    shared: SharedStudy, mine: Trials
) -> None:
    claim = ask(mine)
    assert not requeue_orphans(shared, mine)
    mine.drop_claims()
    assert requeue_orphans(shared, mine)
    assert states(shared) == ["WAITING"]
    assert ask(mine).number == claim.number


def test_a_claim_under_a_former_id_of_this_member_is_an_orphan(
    shared: SharedStudy, mine: Trials
) -> None:
    ask(mine)
    mine._liveness.id = "me-again"
    assert not requeue_orphans(shared, mine, "me", "me-again")
    assert requeue_orphans(shared, mine, "me-again")
    assert states(shared) == ["WAITING"]


def ask_in_a_transaction_that_fails(trials: Trials) -> None:
    """Ask for a trial; the connection is lost once the trial is recorded."""
    run_locked = trials._shared.run_locked

    def fail_at_the_end(action: Any) -> None:
        run_locked(action)
        raise ConnectionError("the server is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials._shared, "run_locked", fail_at_the_end)
        with pytest.raises(ConnectionError):
            trials.ask(9, 0)


def test_a_claim_whose_transaction_failed_is_dropped(shared: SharedStudy, mine: Trials) -> None:
    kept = ask(mine)
    ask_in_a_transaction_that_fails(mine)
    assert states(shared) == ["RUNNING", "RUNNING"]
    assert ask(mine, 2).number == 1  # not a third one
    mine.tell(kept, TrialState.COMPLETE, 0.5)


def test_a_requeued_trial_is_claimed_again_after_a_failed_transaction(
    shared: SharedStudy, mine: Trials
) -> None:
    mine.requeue(ask(mine))
    ask_in_a_transaction_that_fails(mine)
    assert states(shared) == ["RUNNING"]
    assert ask(mine, 1).number == 0
