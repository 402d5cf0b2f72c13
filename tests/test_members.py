"""mnist.search.members: locks, leases, the exact budget, and the limits of a lost lease."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from filelock import FileLock, Timeout
from optuna.trial import TrialState
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError

from mnist.search import budget, liveness, locks, members
from mnist.search import storage as storages
from mnist.search import study as studies
from mnist.search.claims import Claim, ClaimLost
from mnist.search.members import Member
from mnist.search.storage import StorageError, StudyGone
from tests.conftest import ROOT, Clock
from tests.gates import until


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/db.sqlite3"
    return request.getfixturevalue("postgresql")


@pytest.fixture
def one(storage: str) -> Iterator[Member]:
    with Member(storage, "study", threads=1) as member:
        member.study.pruner = studies.make_pruner(600)
        yield member


@pytest.fixture
def two(storage: str, one: Member) -> Iterator[Member]:
    with Member(storage, "study", threads=1) as member:
        member.study.pruner = studies.make_pruner(600)
        yield member


def states(member: Member) -> list[TrialState]:
    return [trial.state for trial in member.study.trials]


def test_many_members_together_finish_exactly_the_trials_asked_for(storage: str) -> None:
    def work(_: int) -> int:
        done = 0
        with Member(storage, "study", threads=1) as member:
            while claim := member.trials.ask(20, seed=0):
                member.trials.tell(claim, TrialState.COMPLETE, claim.params["lr"])
                done += 1
        return done

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(work, range(6))) == 20
    with Member(storage, "study", threads=1) as member:
        assert states(member) == [TrialState.COMPLETE] * 20
        assert [trial.number for trial in member.study.trials] == list(range(20))


def test_a_running_trial_takes_its_place_in_the_budget(one: Member, two: Member) -> None:
    claim = one.trials.ask(1, seed=0)
    assert claim is not None
    assert two.trials.ask(1, seed=0) is None
    one.trials.requeue(claim)
    again = two.trials.ask(1, seed=0)
    assert again is not None
    assert (again.number, again.params) == (claim.number, claim.params)


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
@pytest.mark.parametrize("others", [0, 1])  # trials that another member has begun by then
def test_a_trial_whose_transaction_fails_waits_and_blocks_nobody(
    one: Member, two: Member, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = one.shared.lock, []

    @contextlib.contextmanager
    def failing_lock() -> Iterator[None]:
        with real():
            yield
        if not lost:  # as after a suspended process or a restarted server
            lost.append(True)
            for _ in range(others):
                assert two.trials.ask(3, seed=1)
            raise OperationalError("COMMIT", {}, Exception("the server ended the session"))

    before = one.trials.ask(2, seed=0)
    assert before is not None
    monkeypatch.setattr(one.shared, "lock", failing_lock)
    claim = one.trials.ask(2, seed=0)
    assert lost
    if others:
        assert claim is None
        assert states(one) == [TrialState.RUNNING, TrialState.WAITING, TrialState.RUNNING]
    else:
        assert claim is not None
        one.trials.tell(claim, TrialState.COMPLETE, 0.5)
        assert states(one) == [TrialState.RUNNING, TrialState.COMPLETE]
    one.trials.tell(before, TrialState.COMPLETE, 0.5)


def list_sessions(member: Member) -> list[int]:
    """List the process ids of the database server's sessions."""
    with member.shared.engine.connect() as connection:
        return list(connection.execute(text("SELECT pid FROM pg_stat_activity")).scalars())


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
@pytest.mark.parametrize("holder", ["lock", "storage"])
def test_a_transaction_that_stalls_is_ended_and_its_locks_with_it(
    one: Member, two: Member, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = two.trials.ask(1, seed=0)
    assert claim is not None
    engine = {"lock": one.shared.engine, "storage": one.shared.storage._backend.engine}[holder]
    engine.dispose()
    monkeypatch.setattr(storages, "TRANSACTION_TIMEOUT_S", 1.0)
    with engine.connect() as stopped:
        stopped.execute(text("SELECT * FROM trials FOR UPDATE"))
        pid = stopped.execute(text("SELECT pg_backend_pid()")).scalar()
        until(lambda: pid not in list_sessions(two), "its session is ended", 60)
        with pytest.raises(DBAPIError, match="idle-in-transaction timeout"):
            stopped.execute(text("SELECT 1"))
        assert two.trials.tell(claim, TrialState.COMPLETE, 0.5) == 0.5


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_an_action_that_failed_during_a_long_suspension_is_retried(
    one: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "RETRY_S", 0.0)
    attempts = []

    def change(_: object) -> int:
        attempts.append(True)
        if len(attempts) == 1:
            raise OperationalError("COMMIT", {}, Exception("the server ended the session"))
        return len(attempts)

    assert one.run_locked(change) == 2


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
def test_a_member_on_this_machine_is_dead_when_its_lock_is_free_and_only_then(
    one: Member, two: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = one.trials.ask(5, seed=0)
    assert claim is not None
    monkeypatch.setattr(liveness, "GRACE_PERIOD_S", -1.0)
    two.poll()
    assert states(two) == [TrialState.RUNNING]
    one.liveness.file_lock.release()  # as the operating system does it
    two.poll()
    assert states(two) == [TrialState.WAITING]


def test_a_member_on_another_machine_is_dead_when_it_is_silent_for_the_grace_period(
    one: Member, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, clock = one.trials.ask(5, seed=0), Clock()
    assert claim is not None
    one._stopping.set()  # it sends heartbeats only by poll()
    one._heartbeat.join()
    monkeypatch.setattr(liveness, "time", clock)
    monkeypatch.setattr(locks, "host_id", lambda folder: "another machine")
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(liveness, "GRACE_PERIOD_S", 10.5 * liveness.HEARTBEAT_S)

    def read_beat() -> int:
        return far.entries()[far.id]["beat"]

    def wait_for_beat() -> None:
        clock.now_s += liveness.HEARTBEAT_S
        count = read_beat()
        until(lambda: read_beat() > count, "the other machine has polled", 60)

    with Member(storage, "study", threads=1) as far:
        for _ in range(15):
            one.poll()
            wait_for_beat()
        for _ in range(8):
            wait_for_beat()
        assert states(far) == [TrialState.RUNNING]
        for _ in range(4):
            wait_for_beat()
        assert states(far) == [TrialState.WAITING]


def test_a_trial_recorded_as_this_member_s_without_a_claim_is_requeued(
    one: Member, two: Member
) -> None:
    claim = one.trials.ask(1, seed=0)
    assert claim is not None
    one.trials.requeue(claim)
    studies.ask(two.study, seed=0)  # and killed before it recorded its claim
    again = one.trials.ask(1, seed=0)
    assert again is not None
    assert again.number == claim.number


def test_all_urls_of_a_database_have_the_same_lock(storage: str) -> None:
    other = storage.replace("sqlite:", "sqlite+pysqlite:").replace("sql:", "sql+psycopg:")
    order = []
    with Member(storage, "study", threads=1) as one, Member(other, "study", threads=1) as two:

        def enter() -> None:
            with two.shared.lock():
                order.append("two")

        with one.shared.lock():
            thread = threading.Thread(target=enter)
            thread.start()
            time.sleep(0.5)
            order.append("one")
        thread.join()
    assert order == ["one", "two"]


def test_studies_that_start_together_on_a_new_database_do_not_disturb_one_another(
    storage: str,
) -> None:
    def work(i: int) -> int:
        with Member(storage, f"study-{i}", threads=1) as member:
            return len(member.study.trials)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [0] * 4


def lose_claim(one: Member, two: Member) -> Claim:
    """Claim a trial for `one`, and again for `two`; returns the lost claim."""
    claim = one.trials.ask(5, seed=0)
    assert claim is not None
    two.run_locked(lambda study: study.set_user_attr("members", {two.id: two.entries()[two.id]}))
    two.poll()
    second_claim = two.trials.ask(5, seed=0)
    assert second_claim is not None
    assert second_claim.number == claim.number
    return claim


def test_a_member_that_was_declared_dead_cannot_change_the_trial(one: Member, two: Member) -> None:
    claim = lose_claim(one, two)
    with pytest.raises(ClaimLost, match="trial 0 was taken over"):
        one.trials.report(claim, 100, 0.1)
    with pytest.raises(ClaimLost):
        one.trials.tell(claim, TrialState.COMPLETE, 0.1)
    with pytest.raises(ClaimLost):
        one.trials.requeue(claim)
    assert two.study.trials[0].intermediate_values == {}
    assert states(two) == [TrialState.RUNNING]
    before = one.id
    one.poll()  # it works on, as another member
    assert one.id != before
    assert one.trials.ask(5, seed=0) is not None


def test_a_pruning_decision_that_was_lost_with_its_process_is_repeated(one: Member) -> None:
    rung = budget.rungs(600)[0]
    for accuracy in (0.9, 0.8, 0.7):
        claim = one.trials.ask(9, seed=0)
        assert claim is not None
        prune = one.trials.report(claim, rung, accuracy)
        assert prune == (accuracy < 0.9)
        assert one.trials.report(claim, rung, accuracy) == prune
        one.trials.tell(claim, TrialState.PRUNED if prune else TrialState.COMPLETE, accuracy)


def test_one_member_leads_until_it_leaves(one: Member, two: Member) -> None:
    assert one.become_leader()
    assert not two.become_leader()
    assert one.become_leader()
    one.__exit__()
    assert two.become_leader()
    one._heartbeat = threading.Thread(target=lambda: None)  # for its second exit
    one._heartbeat.start()
    one.liveness.file_lock.acquire()


def test_ctrl_c_waits_for_the_end_of_the_lock(one: Member) -> None:
    done = []

    def interrupted() -> None:
        with one.shared.lock():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == [1]
    with one.shared.lock():
        pass


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
def test_a_killed_member_is_found_at_once(one: Member, storage: str) -> None:
    code = (
        "import os, signal; from mnist.search.members import Member; "
        f"m = Member({storage!r}, 'study', 1); m.__enter__(); m.trials.ask(5, 0); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert states(one) == [TrialState.RUNNING]
    one.poll()
    assert states(one) == [TrialState.WAITING]
    assert set(one.entries()) == {one.id}
    files = list(one.shared.folder.glob(f"{one.shared.prefix}-*.lock"))
    assert [path.name for path in files] == [Path(one.liveness.file_lock.lock_file).name]


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
def test_every_connection_waits_a_minute_for_another_one_s_statement(one: Member) -> None:
    for engine in (one.shared.engine, one.shared.storage._backend.engine):  # type: ignore[attr-defined]
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 60_000


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
def test_a_lock_on_the_database_is_waited_for(one: Member, tmp_path: Path) -> None:
    import sqlite3

    other = sqlite3.connect(tmp_path / "db.sqlite3", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(1.0, other.rollback).start()
    assert one.trials.ask(5, seed=0) is not None
    other.close()


@contextlib.contextmanager
def opened(storage: str) -> Iterator[optuna.storages.RDBStorage]:
    database = optuna.storages.RDBStorage(storage)
    yield database
    database.remove_session()
    database.engine.dispose()


def delete(storage: str) -> None:
    with opened(storage) as database:
        optuna.delete_study(study_name="study", storage=database)


def delete_and_make_again(storage: str) -> None:
    delete(storage)  # SQLite uses its number again
    optuna.create_study(study_name="study", storage=storage, direction="maximize")


def rename(storage: str) -> None:
    with opened(storage) as database:
        optuna.copy_study(
            from_study_name="study",
            to_study_name="other",
            from_storage=database,
            to_storage=database,
        )
    delete(storage)


def remove_file(storage: str) -> None:
    Path(storage.removeprefix("sqlite:///")).unlink()


def empty_file(storage: str) -> None:
    remove_file(storage)
    Path(storage.removeprefix("sqlite:///")).touch()


def remove_folder(storage: str) -> None:
    shutil.rmtree(Path(storage.removeprefix("sqlite:///")).parent)


def drop_tables(storage: str) -> None:
    engine = create_engine(storage)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
    engine.dispose()


def drop_database(storage: str) -> None:
    url = make_url(storage)
    engine = create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {url.database} WITH (FORCE)"))
    engine.dispose()


@pytest.mark.parametrize(
    ("storage", "act"),
    [
        *(("sqlite", act) for act in (delete, delete_and_make_again, rename)),
        *(("sqlite", act) for act in (remove_file, empty_file, remove_folder)),
        *(("postgresql", act) for act in (delete, rename, drop_tables, drop_database)),
    ],
    indirect=["storage"],
)
def test_an_error_says_that_a_study_was_removed(
    storage: str, act: Callable[[str], None], tmp_path: Path
) -> None:
    with Member(storage, "study", threads=1) as member:
        claim = member.trials.ask(9, seed=0)
        assert claim is not None
        act(storage)
        for action in (
            lambda: member.trials.tell(claim, TrialState.COMPLETE, 0.5),
            lambda: member.trials.ask(9, seed=0),
            lambda: member.run_locked(lambda study: study.set_user_attr("key", "value")),
            member.poll,
        ):
            with pytest.raises(StudyGone, match="study study is gone from"):
                action()
    assert tmp_path.exists() == (act is not remove_folder)


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_a_failing_database_is_not_reported_as_removed(one: Member) -> None:
    def divide(_: object) -> None:
        with one.shared.engine.connect() as connection:
            connection.execute(text("SELECT 1 / 0"))

    with pytest.raises(StorageError, match="division by zero") as caught:
        one.run_locked(divide)
    assert not isinstance(caught.value, StudyGone)
    assert not caught.value.passing
    one.shared.url = "postgresql://me:zero@host/db"
    with pytest.raises(StorageError, match=r"^postgresql://\*\*\*@host/db: division by \*\*\*$"):
        one.run_locked(divide)
    with pytest.raises(KeyError, match="a mistake"):
        one.run_locked(lambda _: {}["a mistake"])


def test_a_member_leaves_no_lock_behind(storage: str) -> None:
    with Member(storage, "study", threads=1) as member:
        file = Path(member.liveness.file_lock.lock_file)
        assert file.exists()
        with pytest.raises(Timeout):
            FileLock(file).acquire(timeout=0)
    assert not file.exists()


sqlite_only = pytest.mark.parametrize("storage", ["sqlite"], indirect=True)


@sqlite_only
def test_a_member_takes_the_lead_of_one_that_is_gone(one: Member, two: Member) -> None:
    one.run_locked(lambda study: study.set_user_attr("finisher", "gone"))
    assert two.become_leader()
    assert one.study.user_attrs["finisher"] == two.id
    assert not one.become_leader()


@sqlite_only
def test_a_member_that_was_declared_dead_leads_again_after_its_next_poll(one: Member) -> None:
    assert one.become_leader()
    one.run_locked(lambda study: study.set_user_attr("members", {}))
    assert not one.become_leader()
    one.poll()
    assert one.become_leader()
    assert one.study.user_attrs["finisher"] == one.id


@sqlite_only
def test_heartbeats_continue_after_an_error(
    storage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.01)
    caplog.set_level("DEBUG", "mnist.search.members")
    member = Member(storage, "study", threads=1)
    real, beats = member._poll_once, []

    def fail_once() -> None:
        beats.append(True)
        if len(beats) == 1:
            raise StorageError("the server is restarted")
        real()

    monkeypatch.setattr(member, "_poll_once", fail_once)
    with member:
        until(lambda: member.entries()[member.id]["beat"] > 2, "it has sent heartbeats", 60)
    assert "no heartbeat: the server is restarted" in caplog.text
    assert not member._heartbeat.is_alive()


@sqlite_only
def test_a_member_that_leaves_requeues_its_trials_and_no_other(one: Member, storage: str) -> None:
    with Member(storage, "study", threads=3) as leaving:
        claims = [one.trials.ask(9, seed=0), leaving.trials.ask(9, seed=0)]
        assert [claim.threads for claim in claims if claim] == [1, 3]
        assert (leaving.name, leaving.study_id) == ("study", one.study.user_attrs["id"])
        assert {*one.entries()} == {one.id, leaving.id}
    assert states(one) == [TrialState.RUNNING, TrialState.WAITING]
    assert {*one.entries()} == {one.id}


@sqlite_only
def test_a_command_that_ends_requeues_its_trials_while_it_is_a_member(one: Member) -> None:
    assert one.trials.ask(9, seed=0)
    one.requeue_all()
    assert states(one) == [TrialState.WAITING]
    assert one.id in one.entries()


@sqlite_only
def test_a_command_that_ends_after_the_removal_of_its_study_raises_nothing(storage: str) -> None:
    with Member(storage, "study", threads=1) as member:
        delete(storage)
        member.requeue_all()


@sqlite_only
def test_a_folder_without_room_for_the_lock_is_named(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(members, "Liveness", fail)
    with pytest.raises(storages.StudyError, match="read-only file system") as caught:
        Member(storage, "study", threads=1)
    assert storage in str(caught.value)
