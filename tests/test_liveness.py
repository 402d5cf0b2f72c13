"""mnist.search.liveness: the signs of life of a study's members, without a database."""

from pathlib import Path

import pytest

from mnist.search import liveness
from mnist.search.liveness import Entries, Liveness
from tests.conftest import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


@pytest.fixture
def member(tmp_path: Path, clock: Clock) -> Liveness:
    return Liveness(tmp_path, "study")


def far(beat: int) -> Entries:
    """The entry of a member on another machine."""
    return {"far": {"host": "another", "lock": "study-far.lock", "beat": beat}}


def poll(member: Liveness, clock: Clock, after_s: float, beat: int) -> bool:
    """Whether the far member counts as alive, some seconds after the last poll."""
    clock.now_s += after_s
    return "far" in member.update(far(beat))


def test_a_member_on_another_machine_is_dead_after_a_minute_of_silence(
    member: Liveness, clock: Clock
) -> None:
    assert poll(member, clock, 1000, beat=1)
    assert [poll(member, clock, 10, beat=1) for _ in range(7)] == [True] * 6 + [False]
    assert poll(member, clock, 10, beat=2)
    assert all(poll(member, clock, 10, beat=2) for _ in range(6))
