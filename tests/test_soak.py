"""Kills, stops and lost connections, with real processes; tests/soak.py does more of it by hand."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import soak
from tests.soak import DIGITS, Command

pytestmark = pytest.mark.slow
Start = Callable[..., Command]

SHORT_LEASES = """
import os
from mnist import members, study
members.BEAT_S, members.GRACE_S, study.STALL_S = 0.5, 4.0, 2.0
members.host = lambda folder: os.environ["SOAK_HOST"]
"""
STOP_WITH_A_LOCK = """
import os, signal
from pathlib import Path
from sqlalchemy import Engine, event
@event.listens_for(Engine, "after_cursor_execute")
def stop(connection, cursor, statement, *rest):
    if "FOR UPDATE" in statement and Path("stop").exists():
        Path("stop").rename("stopped")
        os.kill(os.getpid(), signal.SIGSTOP)
"""
COUNT_EVALUATIONS = """
from pathlib import Path
from mnist import data
digits = data.DATASETS["digits"]
def counting(folder, part):
    if part == "test":
        with Path("evaluations").open("a") as log:
            log.write("the test split was opened" + chr(10))
    return digits.read(folder, part)
data.DATASETS["digits"] = data.Source(counting, digits.classes, digits.recipe)
"""
COUNT_RESULTS = """
from pathlib import Path
from mnist import release
real = release.keep
def keep(state, path, *rest):
    if path.name.startswith("test-"):
        with Path("evaluations").open("a") as log:
            log.write(path.name + chr(10))
    return real(state, path, *rest)
release.keep = keep
"""


def test_five_kills_lose_nothing(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/db.sqlite3"
    soak.soak(storage, tmp_path, kills=5, seed=1, trials=20)


def test_five_kills_and_a_restart_of_postgresql_lose_nothing(
    tmp_path: Path, server: Any, postgresql: str
) -> None:
    soak.soak(postgresql, tmp_path, 5, seed=2, middle=lambda: soak.restart(server), trials=20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a Command; none is left behind, nor asleep, where a test fails."""
    begun: list[Command] = []

    def start(options: list[str], patch: str = "") -> Command:
        begun.append(Command(tmp_path, options, patch))
        return begun[-1]

    yield start
    for command in begun:
        for pid in command.below() if command.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.process.kill()
        command.process.wait()


def until(condition: Callable[[], Any], what: str) -> None:
    soak.wait_until(condition, 240, what)


def test_a_machine_that_is_silent_for_a_while_keeps_its_trial(
    start: Start, tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "12"]
    monkeypatch.setenv("SOAK_HOST", "one")
    one = start(options, SHORT_LEASES)
    until(lambda: soak.finished(postgresql), "a trial is finished")
    monkeypatch.setenv("SOAK_HOST", "two")
    two = start(options, SHORT_LEASES)
    until(two.below, "another machine works too")
    processes = [one.process.pid, *one.below()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1)  # two beats; the database waits for two seconds
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert two.process.wait(120) == 0
    assert one.process.wait(120) == 0
    assert soak.check(postgresql, tmp_path, 12) == 0
    assert soak.resumed(postgresql) == 0


def test_a_machine_that_is_silent_for_too_long_loses_its_trial_and_gives_no_second_result(
    start: Start, tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "14"]
    monkeypatch.setenv("SOAK_HOST", "one")
    one = start(options, SHORT_LEASES)
    until(lambda: soak.finished(postgresql), "a trial is finished")
    processes = [one.process.pid, *one.below()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setenv("SOAK_HOST", "two")
    two = start(options, SHORT_LEASES)
    until(lambda: len(soak.finished(postgresql)) >= 10, "another machine goes on")
    time.sleep(5)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert two.process.wait(120) == 0
    assert one.process.wait(120) == 0
    assert soak.check(postgresql, tmp_path, 14, stalled=1) == 0


def test_a_machine_that_falls_asleep_in_a_transaction_holds_up_no_other(
    start: Start, tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "14"]
    monkeypatch.setenv("SOAK_HOST", "one")
    one = start(options, STOP_WITH_A_LOCK + SHORT_LEASES)
    until(lambda: soak.finished(postgresql), "a trial is finished")
    (tmp_path / "stop").touch()
    until((tmp_path / "stopped").exists, "it sleeps with a row of the database locked")
    monkeypatch.setenv("SOAK_HOST", "two")
    two = start(options, SHORT_LEASES)
    until(lambda: len(soak.finished(postgresql)) == 14, "another machine does all the rest")
    os.kill(one.process.pid, signal.SIGCONT)
    assert two.process.wait(120) == 0
    assert one.process.wait(120) == 0
    assert soak.check(postgresql, tmp_path, 14, stalled=1) == 0


def test_a_finisher_that_was_silent_for_too_long_does_not_save_a_second_model(
    start: Start, tmp_path: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "2", "--final-epochs", "40"]
    monkeypatch.setenv("SOAK_HOST", "one")
    one = start(options, COUNT_EVALUATIONS + SHORT_LEASES)
    until(lambda: "final model: " in one.log.read_text(), "the final training goes on")
    processes = [one.process.pid, *one.below()]
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setenv("SOAK_HOST", "two")
    two = start(options, COUNT_EVALUATIONS + SHORT_LEASES)
    until(lambda: two.log.read_text().count("final model: ") == 2, "another one finishes instead")
    for pid in processes:
        os.kill(pid, signal.SIGCONT)
    assert two.process.wait(120) == 0
    assert one.process.wait(120) == 0
    assert soak.check(postgresql, tmp_path, 2) == 0
    assert len((tmp_path / "evaluations").read_text().splitlines()) == 1


def test_four_commands_killed_at_the_end_leave_one_model_and_one_evaluation(
    start: Start, tmp_path: Path, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "4", "--final-epochs", "150"]
    log = tmp_path / "stderr"
    log.touch()
    for words in ("final model: ", "evaluating, once, and saving", ""):
        before = log.read_text().count(words)
        commands = [start(options, COUNT_RESULTS) for _ in range(4)]
        if words:
            until(lambda: log.read_text().count(words) > before, f"it says {words}")  # noqa: B023
            for command in commands:
                command.process.kill()
                command.process.wait()
        else:
            assert [command.process.wait(300) for command in commands] == [0] * 4
    soak.check(postgresql, tmp_path, 4)
    assert len((tmp_path / "evaluations").read_text().splitlines()) == 1
