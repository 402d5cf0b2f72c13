"""mnist.search.liveness: the signs of life of a study's members, without a database."""

from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from mnist.search import liveness, locks
from mnist.search.liveness import Entries, Liveness
from tests.conftest import Clock

LONG_S = 1_000.0  # more than any grace period


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


@pytest.fixture
def member(tmp_path: Path, clock: Clock) -> Liveness:
    return Liveness(tmp_path, "study")


def far(beat: int, name: str = "far") -> Entries:
    """The entry of a member on another machine, whose lock file has the name of one here."""
    return {name: {"host": "another", "lock": "study-far.lock", "beat": beat}}


def poll(member: Liveness, clock: Clock, after_s: float, beat: int) -> bool:
    """Whether the far member counts as alive, some seconds after the last poll."""
    clock.now_s += after_s
    return "far" in member.update(far(beat))


def lock_file(member: Liveness) -> Path:
    return Path(member.file_lock.lock_file)


def test_a_member_has_an_entry_with_its_lock_and_a_growing_beat(
    tmp_path: Path, member: Liveness
) -> None:
    host, name = locks.host_id(tmp_path), member.id
    lock = {"host": host, "lock": f"study-{name}.lock"}
    entries = member.update({})
    assert entries == {name: lock | {"beat": 1}}
    assert member.update(entries) == {name: lock | {"beat": 2}}
    assert lock_file(member) == tmp_path / f"study-{name}.lock"
    with pytest.raises(Timeout):
        FileLock(lock_file(member)).acquire(timeout=0)


def test_a_member_leaves_no_file(member: Liveness) -> None:
    member.leave()
    assert not lock_file(member).exists()
    member.leave()  # another member has removed the file


def test_a_member_on_another_machine_is_dead_after_a_minute_of_silence(
    member: Liveness, clock: Clock
) -> None:
    assert poll(member, clock, LONG_S, beat=1)
    assert [poll(member, clock, 10, beat=1) for _ in range(7)] == [True] * 6 + [False]
    assert poll(member, clock, 10, beat=2)
    assert all(poll(member, clock, 10, beat=2) for _ in range(6))


def test_time_in_which_a_member_did_not_look_counts_as_two_heartbeats(
    member: Liveness, clock: Clock
) -> None:
    polls = [poll(member, clock, LONG_S, beat=1) for _ in range(5)]
    assert polls == [True, True, True, True, False]  # silent for 0, 20, 40, 60 and 80 s


def test_each_member_has_a_silence_of_its_own(member: Liveness, clock: Clock) -> None:
    for beat in range(8):
        entries = member.update(far(beat) | far(1, "silent"))
        clock.now_s += 10
    assert {"far", "silent"} & {*entries} == {"far"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_file_of_this_machine_says_nothing_about_another_one(
    tmp_path: Path, member: Liveness, clock: Clock, exists: bool
) -> None:
    file = tmp_path / "study-far.lock"
    if exists:
        file.touch()
    assert poll(member, clock, 10, beat=1)
    assert file.exists() == exists


def test_a_member_on_this_machine_lives_as_long_as_it_holds_its_lock(
    tmp_path: Path, member: Liveness, clock: Clock
) -> None:
    other = Liveness(tmp_path, "study")
    entries = other.update({})
    for _ in range(10):
        clock.now_s += 10
        assert other.id in member.update(entries)
    other.file_lock.release()  # as the operating system does it
    assert {*member.update(entries)} == {member.id}
    assert not lock_file(other).exists()


def test_a_member_on_this_machine_without_a_lock_file_is_dead_after_its_silence(
    tmp_path: Path, member: Liveness, clock: Clock
) -> None:
    other = Liveness(tmp_path, "study")
    entries = other.update({})
    other.leave()
    alive = []
    for _ in range(8):
        alive.append(other.id in member.update(entries))
        clock.now_s += 10
    assert alive == [True] * 7 + [False]


def test_a_member_that_others_declared_dead_joins_again(member: Liveness) -> None:
    before, file = member.id, lock_file(member)
    entries = member.update({})
    assert member.id == before  # its first update is not the second one after a death
    assert member.update(entries)[before]["beat"] == 2
    entries = member.update(far(1))
    assert {*entries} == {"far", member.id}
    assert member.id != before
    assert entries[member.id]["beat"] == 1
    assert not file.exists()
    assert lock_file(member).name == entries[member.id]["lock"]
