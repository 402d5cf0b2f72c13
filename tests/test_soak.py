"""Kills, stops and lost connections, with real processes; tests/soak.py does more of it by hand."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests import soak
from tests.gates import LONG_S, Gates, until
from tests.soak import Command

pytestmark = pytest.mark.slow
SHORT = ["--epochs", "3", "--final-epochs", "4"]
DIGITS = [*soak.DIGITS, "--epochs", "2", "--final-epochs", "2"]
Start = Callable[..., Command]
StartAs = Callable[..., tuple[Command, Gates]]

LEASES = """
import os
from mnist.search import liveness, locks, storage
liveness.HEARTBEAT_S, liveness.GRACE_PERIOD_S = 0.5, {grace_s}
storage.TRANSACTION_TIMEOUT_S = {stall_s}
locks.host_id = lambda folder: os.environ["SOAK_HOST"]
"""
# Over in some seconds, but longer than a command on a busy machine is silent by itself.
SHORT_LEASES = LEASES.format(grace_s=10.0, stall_s=5.0)
LONG_LEASES = LEASES.format(grace_s=LONG_S, stall_s=LONG_S)
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
from mnist.search import checkpoints
real = checkpoints.save
def save(state, path, *rest):
    if path.name.startswith("test-"):
        with Path("evaluations").open("a") as log:
            log.write(path.name + chr(10))
    return real(state, path, *rest)
checkpoints.save = save
"""


def test_five_kills_lose_nothing(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/db.sqlite3"
    print(soak.soak(storage, tmp_path, kills=5, seed=0, trials=12, options=SHORT))


def test_five_kills_and_a_restart_of_postgresql_lose_nothing(
    tmp_path: Path, server: Any, postgresql: str
) -> None:
    print(soak.soak(postgresql, tmp_path, 5, 20, server, trials=12, options=SHORT))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a Command; all of them are killed after the test."""
    begun: list[Command] = []

    def start(options: list[str], patch: str = "") -> Command:
        begun.append(Command(tmp_path, options, patch))
        return begun[-1]

    yield start
    for command in begun:
        for pid in command.worker_pids() if command.process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.process.kill()
        command.process.wait()


@pytest.fixture
def start_as(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartAs:
    """Starts a Command as on a machine of that name; with the gates of that machine.

    Some of the gates are closed after a number of steps.
    """

    def start_as(host: str, options: list[str], patch: str, **closed: int) -> tuple[Command, Gates]:
        monkeypatch.setenv("SOAK_HOST", host)
        monkeypatch.setenv("PGAPPNAME", host)
        gates = Gates(tmp_path, host)
        for name, steps in closed.items():
            getattr(gates, name).allow(steps)
        return start(options, patch), gates

    return start_as


def send(command: Command, sign: int) -> None:
    """Send a signal to the command and its workers, as if their machine fell asleep or woke."""
    for pid in (command.process.pid, *command.worker_pids()):
        os.kill(pid, sign)


def end(*commands: Command) -> None:
    assert [command.process.wait(2 * LONG_S) for command in commands] == [0] * len(commands)


def running(storage: str) -> tuple[int, str]:
    """The number of the only RUNNING trial, and its owner."""
    with soak.opened(storage) as study:
        (trial,) = study.get_trials(states=(TrialState.RUNNING,))
    return trial.number, trial.user_attrs["run"]["by"]


def beats(storage: str, host: str) -> int:
    with soak.opened(storage) as study:
        members = study.user_attrs["members"].values()
    return sum(member["beat"] for member in members if member["host"] == host)


def waits(server: Any, host: str) -> bool:
    """Whether a session from there waits for a lock of the database."""
    query = f"SELECT 'it waits' FROM pg_stat_activity WHERE application_name = '{host}'"
    return "it waits" in server.psql(f"{query} AND wait_event_type = 'Lock'")


def test_a_machine_that_is_silent_for_a_while_keeps_its_trial(
    start_as: StartAs, tmp_path: Path, server: Any, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "8"]
    one, gates = start_as("one", options, LONG_LEASES, runs=0)
    gates.hold(runs=1, reports=3, is_running=one.is_running)
    held = running(postgresql)
    two, others = start_as("two", options, LONG_LEASES, runs=0)
    until(others.runs.held, "another machine works too")
    send(one, signal.SIGSTOP)
    before = beats(postgresql, "two")
    until(
        lambda: beats(postgresql, "two") >= before + 3 or waits(server, "two"),
        "the other machine has sent heartbeats, or waits for a lock that the sleeping one holds",
    )
    send(one, signal.SIGCONT)
    gates.open()
    others.open()
    end(one, two)
    assert soak.check(postgresql, tmp_path, 8) == 0
    assert soak.finished(postgresql)[held[0]].user_attrs["run"]["by"] == held[1]
    assert soak.resumed(postgresql) == 0


def test_a_machine_that_is_silent_for_too_long_loses_its_trial_and_gives_no_second_result(
    start_as: StartAs, tmp_path: Path, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "14"]
    one, gates = start_as("one", options, SHORT_LEASES, runs=0)
    gates.hold(runs=1, reports=3, is_running=one.is_running)
    number, owner = running(postgresql)
    send(one, signal.SIGSTOP)
    two, _ = start_as("two", options, SHORT_LEASES)
    until(lambda: number in soak.finished(postgresql), "another machine goes on with its trial")
    gates.open()
    send(one, signal.SIGCONT)
    end(one, two)
    assert soak.check(postgresql, tmp_path, 14, stalled=1) == 0
    assert soak.finished(postgresql)[number].user_attrs["run"]["by"] != owner


def test_a_machine_that_sleeps_in_a_transaction_blocks_no_other(
    start_as: StartAs, tmp_path: Path, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "8"]
    one, gates = start_as("one", options, STOP_WITH_A_LOCK + SHORT_LEASES, runs=0)
    gates.hold(runs=1, reports=3, is_running=one.is_running)
    (tmp_path / "stop").touch()
    gates.open()
    until((tmp_path / "stopped").exists, "it sleeps with a row of the database locked")
    two, _ = start_as("two", options, SHORT_LEASES)
    until(lambda: len(soak.finished(postgresql)) == 8, "another machine does all the rest")
    os.kill(one.process.pid, signal.SIGCONT)
    end(one, two)
    assert soak.check(postgresql, tmp_path, 8, stalled=1) == 0


def test_a_leader_that_was_silent_for_too_long_does_not_save_a_second_model(
    start_as: StartAs, tmp_path: Path, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "2", "--final-epochs", "4"]
    one, gates = start_as("one", options, COUNT_EVALUATIONS + SHORT_LEASES, final=3)
    until(gates.final.held, "the final training goes on")
    send(one, signal.SIGSTOP)
    two, others = start_as("two", options, COUNT_EVALUATIONS + SHORT_LEASES, final=3)
    until(others.final.held, "another member leads instead")
    gates.open()
    send(one, signal.SIGCONT)
    others.open()
    end(one, two)
    assert soak.check(postgresql, tmp_path, 2) == 0
    assert len((tmp_path / "evaluations").read_text().splitlines()) == 1


def test_two_commands_killed_at_the_end_leave_one_model_and_one_evaluation(
    start: Start, tmp_path: Path, postgresql: str
) -> None:
    options = [*DIGITS, "--storage", postgresql, "--trials", "4", "--final-epochs", "4"]
    gates = Gates(tmp_path)
    for gate, steps in ((gates.final, 3), (gates.saving, 0), (gates.saving, 1)):
        gate.allow(steps)
        commands = [start(options, COUNT_RESULTS) for _ in range(2)]
        until(gate.held, "one of them has got so far")
        for command in commands:
            command.process.kill()
            command.process.wait()
        gate.open()
    end(*(start(options, COUNT_RESULTS) for _ in range(2)))
    soak.check(postgresql, tmp_path, 4)
    assert len((tmp_path / "evaluations").read_text().splitlines()) == 1
